"""What `rosa train` costs a step beside a bare loop of torch: the same model and optimizer.

MiniLM on paragraphs of Python's documentation, cut at 64 tokens, ROSA in attention; the trainer's
steps with all that is around them (counts, clipping, checks, callbacks, logs), and the loop's, in
turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_linear_schedule_with_warmup

from rosa.bench.checking import check
from rosa.bench.settings import RunSettings
from rosa.bench.trainer import build_trainer, collator
from rosa.bench.training import prepare


class Stopwatch(TrainerCallback):
    """The time when each step begins."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun.append(time.perf_counter())


def by_trainer(settings: RunSettings) -> float:
    """Median seconds of a step of `rosa train`."""
    ready = prepare(settings)
    trainer, _ = build_trainer(settings, ready.task, ready.rows, ready.model, ready.tokenizer)
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    return statistics.median(b - a for a, b in itertools.pairwise(watch.begun))


def by_hand(settings: RunSettings) -> float:
    """Median seconds of a step of a bare loop."""
    ready = prepare(settings)
    rows = ready.rows["train"]
    columns = [n for n in rows.column_names if n in ("input_ids", "attention_mask", "labels")]
    order = torch.Generator().manual_seed(settings.seed)
    collate = collator(settings, ready.task, ready.tokenizer)
    loader = DataLoader(
        rows.select_columns(columns),
        settings.batch_size,
        shuffle=True,
        generator=order,
        collate_fn=collate,
    )
    model = ready.model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr or 1e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.steps or 1)
    begun = []
    for _, batch in zip(range(settings.steps or 1), loader, strict=False):
        begun.append(time.perf_counter())
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return statistics.median(b - a for a, b in itertools.pairwise(begun))


def main() -> None:
    """Measure, and write loop.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="an encoder's folder, such as MiniLM's")
    parser.add_argument("--output", type=Path, default=Path("docs/results/speed-loop"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    pairs = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = check(
                RunSettings(
                    model=given.model,
                    output=Path(folder),
                    task="demo",
                    steps=given.steps,
                    precision="fp32",
                    max_length=64,
                    eval_batch_size=64,
                )
            )
            pairs.append({"trainer": by_trainer(settings), "loop": by_hand(settings)})
    ratios = sorted(pair["trainer"] / pair["loop"] for pair in pairs)
    found = {
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "rounds": pairs,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "loop.json").write_text(json.dumps(found, indent=2) + "\n")
    Console().print({name: found[name] for name in ("ratio", "quartiles")})


if __name__ == "__main__":
    main()
