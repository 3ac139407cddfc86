"""What a training step keeps in memory, counted: adapters, and what trains every weight.

    python benchmarks/memory.py --output docs/results/memory
    python benchmarks/memory.py --output docs/results/memory --model <decoder>

What autograd keeps for the backward pass is counted tensor by tensor, each piece of memory once and
without the weights, in a real forward pass of models of one and of two layers; every further layer
keeps as much as the second. Beside it stand the bytes of the weights, of what is trained, of its
gradients and of Adam's moments, and from all of them the largest batch that a device holds.

With ``--model`` that decoder itself is counted, in float32, for a batch of that many texts of so
many tokens: what is kept, and what an adapter is with its gradients and moments. Of full
fine-tuning, GaLore and APOLLO it is the gradients of all weights and what the optimizer itself has
in its state after a step, which must be as many numbers as the other tables take it for.

With ``--real`` a step of RoBERTa-base's shapes on that many examples is made, and by how much the
process grows at its peak stands beside what was counted (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    Trainer,
    TrainingArguments,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

import rosa
from rosa.bench.planning import kept_bytes
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings

MIB, GIB = 2**20, 2**30
DTYPE = torch.bfloat16
TOKENS = 512
"""Tokens of an example."""
DEVICES = (8, 16, 24, 80)
"""Memory of accelerators, GiB."""
SHARE = 0.9
"""Of it that a training can use: the rest is the libraries' and lost between pieces."""
RANKS = (4, 16, 64)
REAL_RANK = 16
REAL_METHODS = ("LoRA", "ROSA, both", "ROSA, B", "full")


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


def full(model: nn.Module, rank: int) -> nn.Module:
    """Every weight trained: by AdamW, or with moments in a projection, by GaLore and APOLLO."""
    return model.requires_grad_(True)


METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "frozen": frozen,
    "LoRA": lora,
    "LoRA-FA": lora_fa,
    "ROSA, both": with_rosa("both"),
    "ROSA, A": with_rosa("A"),
    "ROSA, B": with_rosa("B"),
    "full": full,
}
RANKLESS = ("frozen", "full")
PROJECTED = {"GaLore": "galore", "APOLLO": "apollo"}
"""Optimizers that train every weight, and their rows of the comparison's methods."""


@dataclass
class Count:
    """What a training step keeps.

    Attributes:
        shapes: whose model it is.
        method: of `METHODS` or `PROJECTED`.
        rank: of the product or the projection; None where there is none.
        checkpointing: whether layers are computed again in the backward pass.
        weights: bytes of the model.
        trained: numbers that are trained.
        moments: numbers in the optimizer's state.
        kept: bytes that autograd keeps for one example.
    """

    shapes: str
    method: str
    rank: int | None
    checkpointing: bool
    weights: int
    trained: int
    moments: int
    kept: int

    def largest_batch(self, memory: float) -> int:
        """Examples that fit, beside the weights, a gradient a trained number, and the moments."""
        fixed = self.weights + DTYPE.itemsize * (self.trained + self.moments)
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


def projected_moments(model: nn.Module, rank: int) -> int:
    """Numbers in the state of an optimizer that projects the gradients of all linear layers.

    Of each such weight two moments of its gradient in r directions, and the directions; the rest
    of the model has two moments a number.
    """
    head = model.get_output_embeddings()
    sides = [
        (min(module.weight.shape), max(module.weight.shape))
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    rest = sum(p.numel() for p in model.parameters()) - sum(a * b for a, b in sides)
    return 2 * rest + sum(min(rank, small) * (2 * large + small) for small, large in sides)


def count(shapes: str) -> list[Count]:
    """Count all methods on one model, from its first two layers."""
    config_of, layers = SHAPES[shapes]
    kind = AutoModelForSequenceClassification if "BERT" in shapes else AutoModelForCausalLM
    cases = [
        (method, rank, checkpointing)
        for checkpointing in (False, True)
        for method in METHODS
        for rank in ((None,) if method in RANKLESS else RANKS)
    ]
    found, projected = [], []
    for number in (1, 2):
        with no_init_weights():  # counting asks for no values but finite ones
            model = kind.from_config(config_of(number), dtype=DTYPE).train()
        model.tie_weights()  # which is a part of what was left out
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        model.enable_input_require_grads()  # as below any adapter
        about = f"{shapes}, {number} of {layers} layers"
        found.append([measure(model, m, r or 1, c) for m, r, c in track(cases, about)])
        projected.append([projected_moments(model, rank) for rank in RANKS])

    def of_all(one: list[int], two: list[int]) -> list[int]:
        return [a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)]

    counts = []
    for (method, rank, checkpointing), one, two in zip(cases, *found, strict=True):
        weights, trained, kept = of_all(one, two)
        counts.append(
            Count(shapes, method, rank, checkpointing, weights, trained, 2 * trained, kept)
        )
    if all(type(m) is not Conv1D for m in model.modules()):  # which these optimizers leave out
        counts += [
            replace(one, method=method, rank=rank, moments=moments)
            for one in counts
            if one.method == "full"
            for method in PROJECTED
            for rank, moments in zip(RANKS, of_all(*projected), strict=True)
        ]
    return counts


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
        [
            c.shapes,
            c.method,
            str(c.rank or ""),
            *(str(c.largest_batch(gib * GIB)) for gib in DEVICES),
        ]
        for c in counts
        if c.method in ("LoRA", "ROSA, both", "ROSA, B", "full", *PROJECTED)
    ]


def of_decoder(folder: str, batch: int, tokens: int) -> list[list[str]]:
    """A row a method and rank: MiB kept, of what is trained with its optimizer, and both."""
    methods = [name for name in (*METHODS, *PROJECTED) if name not in ("frozen", "ROSA, A")]
    rows = []
    for method, rank in ((m, r) for m in methods for r in ((None,) if m in RANKLESS else RANKS)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        ids = torch.randint(5, model.config.vocab_size, (batch, tokens))
        if method == "full" or method in PROJECTED:
            kept, out = kept_bytes(model, partial(model, input_ids=ids, labels=ids))
            beside = _of_optimizer(method, rank or 0, model, out.loss)
        else:
            model.requires_grad_(False)
            adapted = METHODS[method](model, rank or 0)
            model.enable_input_require_grads()
            kept, _ = kept_bytes(adapted, partial(adapted, input_ids=ids, labels=ids))
            named = list(adapted.named_parameters())
            factors = sum(p.nbytes for name, p in named if "rosa_" in name or "lora_" in name)
            trained = sum(p.nbytes for _, p in named if p.requires_grad)
            beside = factors + 3 * trained  # gradients and two moments
        sizes = (kept, beside, kept + beside)
        rows.append([method, str(rank or ""), *(f"{size / MIB:.1f}" for size in sizes)])
    return rows


def _of_optimizer(method: str, rank: int, model: nn.Module, loss: torch.Tensor) -> int:
    """Bytes of all gradients, and of the optimizer's state after a step."""
    row = find_method(PROJECTED.get(method, "full"))
    optim: dict[str, Any] = {"optim": "adamw_torch"}
    if row.optim is not None:
        optim = {
            **row.optim(RunSettings("m", Path("o")), rank),
            "optim_target_modules": "all-linear",
        }
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(scratch, use_cpu=True, report_to=[], **optim)
        optimizer = Trainer(model, arguments).create_optimizer()
    loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    state = _bytes(list(optimizer.state.values()))
    numbers = sum(p.numel() for p in model.parameters())
    counted = 4 * (projected_moments(model, rank) if method in PROJECTED else 2 * numbers)
    assert abs(state - counted) < 0.001 * counted, (method, rank, state, counted)
    return gradients + state


def _bytes(state: Any) -> int:
    """Of all tensors in an optimizer's state, which may hold them in objects of its own."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(_bytes, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_bytes, state))
    return _bytes(vars(state)) if hasattr(state, "__dict__") else 0


def grown(method: str, batch: int) -> None:
    """Print the bytes counted for a step on so many examples, and by how many this process grows.

    Libraries, weights and the optimizer's state are there before, from a step on one example.
    """
    model = AutoModelForSequenceClassification.from_config(roberta(12), dtype=DTYPE).train()
    model.requires_grad_(False)
    adapted = METHODS[method](model, REAL_RANK)
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])

    def inputs(examples: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 1000, (examples, TOKENS))
        return {"input_ids": ids, "labels": torch.zeros(examples, dtype=torch.long)}

    def step(examples: int) -> None:
        adapted(**inputs(examples)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step(1)
    kept, _ = kept_bytes(adapted, partial(adapted, **inputs(1)))
    before = _of_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    step(batch)
    print(json.dumps([kept * batch, _of_process("VmHWM") - before]))


def _of_process(name: str) -> int:
    """Bytes, from what Linux says of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def real_rows(batch: int) -> list[list[str]]:
    """A row a method: MiB counted, and measured twice in processes of their own.

    First with every larger tensor in pages of its own, which go back when it does; then as glibc
    allocates by itself, which keeps what was freed and leaves gaps.
    """
    rows = []
    for method in track(REAL_METHODS, "steps of RoBERTa-base"):
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--grown",
            method,
            "--real",
            str(batch),
        ]
        cells = []
        for how in ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {}):
            environment = {**os.environ, **how}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            counted, measured = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{measured / MIB:.0f} ({measured / counted:.2f})")
        rows.append([method, f"{counted / MIB:.0f}", *cells])
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
    parser.add_argument("--real", type=int, metavar="BATCH", help="make a real step instead")
    parser.add_argument("--grown", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.grown:
        grown(args.grown, args.real)
        return
    if args.real:
        columns = ["method", "counted", "grown by (of the count)", "as glibc allocates"]
        title = f"MiB, RoBERTa-base, {args.real} examples of {TOKENS} tokens, rank {REAL_RANK}"
        text = table(title, real_rows(args.real), columns)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "real.md").write_text(text)
        return
    if args.model:
        columns = ["method", "rank", "kept", "trained, gradients, moments", "together"]
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
