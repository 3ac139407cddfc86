"""What a training step keeps in memory, counted: LoRA, LoRA-FA, and ROSA with both factors or one.

    python benchmarks/memory.py --output docs/results/memory
    python benchmarks/memory.py --output docs/results/memory --model <decoder>

What autograd keeps for the backward pass is counted tensor by tensor, each piece of memory once and
without the weights, in a real forward pass of models of one and of two layers; every further layer
keeps as much as the second. Beside it stand the bytes of the weights, of what is trained, of its
gradients and of Adam's moments, and from all of them the largest batch that a device holds.

With ``--model`` that decoder itself is counted, in float32, for a batch of that many texts of so
many tokens: what is kept, and what an adapter is with its gradients and moments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)
from transformers.initialization import no_init_weights

import rosa
from rosa.bench.planning import kept_bytes

MIB, GIB = 2**20, 2**30
DTYPE = torch.bfloat16
TOKENS = 512
"""Tokens of an example."""
DEVICES = (8, 16, 24, 80)
"""Memory of accelerators, GiB."""
SHARE = 0.9
"""Of it that a training can use: the rest is the libraries' and lost between pieces."""
RANKS = (4, 16, 64)


def roberta(layers: int) -> PretrainedConfig:
    """RoBERTa-base's shapes."""
    return RobertaConfig(num_hidden_layers=layers, max_position_embeddings=TOKENS + 2)


def gpt2(layers: int) -> PretrainedConfig:
    """GPT-2's shapes."""
    return GPT2Config(n_layer=layers, n_positions=TOKENS)


def llama_1b(layers: int) -> PretrainedConfig:
    """The shapes of Llama 3.2 1B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )


SHAPES: dict[str, tuple[Callable[[int], PretrainedConfig], int]] = {
    "RoBERTa-base": (roberta, 12),
    "GPT-2": (gpt2, 12),
    "Llama 1B": (llama_1b, 16),
}
"""The configuration for a number of layers, and how many the model has."""


def lora(model: nn.Module, rank: int) -> nn.Module:
    """PEFT's LoRA."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def lora_fa(model: nn.Module, rank: int) -> nn.Module:
    """PEFT's LoRA, with A left as drawn by its LoRA-FA optimizer."""
    model = lora(model, rank)
    create_lorafa_optimizer(model, r=rank, lora_alpha=2 * rank, lr=1e-3)
    return model


def with_rosa(trained: str) -> Callable[[nn.Module, int], nn.Module]:
    """ROSA, with both factors trained or one."""

    def attach(model: nn.Module, rank: int) -> nn.Module:
        config = rosa.RosaConfig(
            r=rank, directions="orthonormal", trained=trained, target_modules="all-linear"
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    return attach


def frozen(model: nn.Module, rank: int) -> nn.Module:
    """The model alone, with gradients of its inputs: what any adapter keeps at least."""
    return model


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "frozen": frozen,
    "LoRA": lora,
    "LoRA-FA": lora_fa,
    "ROSA, both": with_rosa("both"),
    "ROSA, A": with_rosa("A"),
    "ROSA, B": with_rosa("B"),
}


@dataclass
class Count:
    """What a training step keeps.

    Attributes:
        shapes: whose model it is.
        method: of `METHODS`.
        rank: of the product; None for the frozen model.
        checkpointing: whether layers are computed again in the backward pass.
        weights: bytes of the model.
        trained: numbers that are trained.
        kept: bytes that autograd keeps for one example.
    """

    shapes: str
    method: str
    rank: int | None
    checkpointing: bool
    weights: int
    trained: int
    kept: int

    def largest_batch(self, memory: float) -> int:
        """Examples that fit, beside weights, and a gradient and two moments a trained number."""
        fixed = self.weights + 3 * DTYPE.itemsize * self.trained
        return max(int((SHARE * memory - fixed) // self.kept), 0)


def measure(model: nn.Module, method: str, rank: int, checkpointing: bool) -> list[int]:
    """Bytes of the weights, numbers that are trained, and bytes that are kept of one example."""
    model.requires_grad_(False)
    adapted = METHODS[method](model, rank)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    ids = torch.randint(5, 1000, (1, TOKENS))
    encoder = isinstance(model.config, RobertaConfig)
    inputs = {"input_ids": ids, "labels": torch.zeros(1, dtype=torch.long) if encoder else ids}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept, _ = kept_bytes(adapted, partial(adapted, **inputs))
    if adapted is not model:
        adapted.unload()
    return [weights, trained, kept]


def count(shapes: str) -> list[Count]:
    """Count all methods on one model, from its first two layers."""
    config_of, layers = SHAPES[shapes]
    kind = AutoModelForSequenceClassification if "BERT" in shapes else AutoModelForCausalLM
    cases = [
        (method, rank, checkpointing)
        for checkpointing in (False, True)
        for method in METHODS
        for rank in ((None,) if method == "frozen" else RANKS)
    ]
    found = []
    for number in (1, 2):
        with no_init_weights():  # counting asks for no values but finite ones
            model = kind.from_config(config_of(number), dtype=DTYPE).train()
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        model.enable_input_require_grads()  # as below any adapter
        about = f"{shapes}, {number} of {layers} layers"
        found.append([measure(model, m, r or 1, c) for m, r, c in track(cases, about)])
    return [
        Count(shapes, *case, *(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))
        for case, one, two in zip(cases, *found, strict=True)
    ]


def table(title: str, rows: list[list[str]], columns: list[str]) -> str:
    """In Markdown; also printed."""
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column, justify="left" if column in ("model", "method") else "right")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def kept_rows(counts: list[Count], checkpointing: bool) -> list[list[str]]:
    """A row a method and model: MiB kept of an example at each rank, and the ratio to LoRA's."""
    rows = []
    for shapes in SHAPES:
        for method in METHODS:
            mine = [c for c in counts if (c.shapes, c.method) == (shapes, method)]
            cells = []
            for rank in RANKS:
                of = {c.method: c for c in counts if c.shapes == shapes and c.rank in (rank, None)}
                one = next(c for c in mine if c.rank in (rank, None))
                assert one.checkpointing == checkpointing
                cells.append(f"{one.kept / MIB:.1f} ({one.kept / of['LoRA'].kept:.3f})")
            rows.append([shapes, method, *cells])
    return rows


def batch_rows(counts: list[Count]) -> list[list[str]]:
    """A row a model, method and rank: the largest batch on each device."""
    return [
        [c.shapes, c.method, str(c.rank), *(str(c.largest_batch(gib * GIB)) for gib in DEVICES)]
        for c in counts
        if c.method in ("LoRA", "ROSA, both", "ROSA, B")
    ]


def of_decoder(folder: str, batch: int, tokens: int) -> list[list[str]]:
    """A row a method and rank: MiB kept, of the adapter with its optimizer, and both."""
    rows = []
    for method, rank in ((m, r) for m in METHODS if m not in ("frozen", "ROSA, A") for r in RANKS):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        model.requires_grad_(False)
        adapted = METHODS[method](model, rank)
        model.enable_input_require_grads()
        ids = torch.randint(5, model.config.vocab_size, (batch, tokens))
        kept, _ = kept_bytes(adapted, partial(adapted, input_ids=ids, labels=ids))
        named = list(adapted.named_parameters())
        factors = sum(p.nbytes for name, p in named if "rosa_" in name or "lora_" in name)
        trained = sum(p.nbytes for _, p in named if p.requires_grad)
        beside = factors + 3 * trained  # gradients and two moments
        sizes = (kept, beside, kept + beside)
        rows.append([method, str(rank), *(f"{size / MIB:.1f}" for size in sizes)])
    return rows


def main() -> None:
    """Count everything; print the tables and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for memory.json and memory.md")
    parser.add_argument("--model", help="folder or hub id of a decoder to count instead")
    parser.add_argument("--batch", type=int, default=16, help="its texts a step (16)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each (64)")
    args = parser.parse_args()
    if args.model:
        columns = ["method", "rank", "kept", "adapter, gradients, moments", "together"]
        title = f"MiB, {args.batch} texts of {args.tokens} tokens, float32"
        text = table(title, of_decoder(args.model, args.batch, args.tokens), columns)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "decoder.md").write_text(text)
        return
    counts = [one for shapes in SHAPES for one in count(shapes)]
    parts = []
    for checkpointing in (False, True):
        some = [c for c in counts if c.checkpointing == checkpointing]
        how = "layers computed again in the backward pass" if checkpointing else "all kept"
        columns = ["model", "method", *(f"r {rank}" for rank in RANKS)]
        title = f"MiB kept of an example of {TOKENS} tokens (of LoRA's), {how}"
        parts.append(table(title, kept_rows(some, checkpointing), columns))
        if checkpointing:
            continue  # the layer that is computed again is kept too, and is not in the count
        columns = ["model", "method", "r", *(f"{gib} GiB" for gib in DEVICES)]
        title = f"Largest batch of such examples in {SHARE:.0%} of a device's memory, {how}"
        parts.append(table(title, batch_rows(some), columns))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        packages = {name: version(name) for name in ("torch", "transformers", "peft")}
        record = {"packages": packages, "counts": [asdict(c) for c in counts]}
        (args.output / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.output / "memory.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
