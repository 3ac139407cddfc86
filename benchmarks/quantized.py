"""What a quantized base costs ROSA beside QLoRA, as draws add up: time of a step, the offset.

MiniLM in 4 bits by HQQ, all linear layers of its blocks, ROSA and PEFT's LoRA on it in turn in one
process. What was drawn stands beside a quantized weight, so each draw makes a step a little slower.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoModelForSequenceClassification

from rosa import RosaConfig, resample
from rosa.bench.setup.quantizing import quantize, quantized
from rosa.layers.in_model import rosa_layers

DRAWS = (0, 1, 2, 5, 10, 20, 40)
TEXTS, TOKENS, ROUNDS = 16, 64, 7
TRAINED_STEPS = 3  # before each draw: an offset of what was not trained would be compressed away


def _mib(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def _step(model: nn.Module, batch: dict[str, torch.Tensor], optimizer: Any) -> float:
    began = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def measure(folder: str, rank: int, trained: str) -> list[dict[str, float]]:
    """A row for each number of draws."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    quantize("hqq", base)
    names = quantized(base)
    batch = {
        "input_ids": torch.randint(1000, 20000, (TEXTS, TOKENS)),
        "labels": torch.randint(0, 2, (TEXTS,)),
    }
    configs = {
        "rosa": RosaConfig(r=rank, trained=trained, target_modules=names),
        "lora": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names),
    }
    models: dict[str, Any] = {n: get_peft_model(copy.deepcopy(base), c) for n, c in configs.items()}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for name, model in models.items()
    }
    weights = _mib(p for p in base.parameters())
    rows, drawn = [], 0
    for draws in track(DRAWS, f"rank {rank}, {trained}"):
        while drawn < draws:
            for _ in range(TRAINED_STEPS):
                _step(models["rosa"], batch, optimizers["rosa"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing is watched: all draws are random ones
                resample(models["rosa"], optimizers["rosa"])
            drawn += 1
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS + 1):
            for name, model in models.items():
                times[name].append(_step(model, batch, optimizers[name]))
        median = {name: statistics.median(found[1:]) for name, found in times.items()}
        terms = [layer.adapters["default"].terms for _, layer in rosa_layers(models["rosa"])]
        rows.append(
            {
                "draws": draws,
                "rosa_ms": 1000 * median["rosa"],
                "lora_ms": 1000 * median["lora"],
                "ratio": median["rosa"] / median["lora"],
                "terms": statistics.mean(each.rank for each in terms),
                "offset_mib": _mib(t for each in terms for t in (each.A, each.B)),
                "base_mib": weights,
            }
        )
    return rows


def main() -> None:
    """Measure, and write quantized.json and quantized.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an encoder's folder, such as MiniLM's")
    parser.add_argument("--output", type=Path, default=Path("docs/results/quantized"))
    parser.add_argument("--rank", type=int, default=4)
    given = parser.parse_args()
    found = {trained: measure(given.model, given.rank, trained) for trained in ("both", "B")}
    lines = [
        "| trained | draws | ROSA, ms a step | LoRA | ratio | terms of the offset | offset, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {trained} | {row['draws']} | {row['rosa_ms']:.0f} | {row['lora_ms']:.0f} | "
            f"{row['ratio']:.3f} | {row['terms']:.0f} | {row['offset_mib']:.1f} |"
            for trained, rows in found.items()
            for row in rows
        ),
    ]
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "quantized.json").write_text(json.dumps(found, indent=2) + "\n")
    (given.output / "quantized.md").write_text("\n".join(lines) + "\n")
    Console().print("\n".join(lines))


if __name__ == "__main__":
    main()
