"""What a step of `rosa train` takes: beside a bare loop of torch, and beside what `rosa plan` says.

A pretrained decoder on running text, cut into pieces of one length, ROSA in all linear layers; the
trainer's steps with all that is around them (counts, clipping, checks, callbacks, logs), and the
loop's, in turn.
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
from rosa.bench.planning import plan
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
    order = torch.Generator().manual_seed(settings.seed)
    collate = collator(settings, ready.task, ready.tokenizer)
    loader = DataLoader(
        ready.rows["train"],
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
    """Measure, and write a file of the model's name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="a decoder's folder")
    parser.add_argument("--data", required=True, type=Path, help="a folder as task corpus has")
    parser.add_argument("--output", type=Path, default=Path("docs/results/speed-loop"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    rounds: list[dict[str, float]] = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = check(
                RunSettings(
                    model=str(given.model),
                    output=Path(folder),
                    task="corpus",
                    data=given.data,
                    target_modules=("all-linear",),
                    steps=given.steps,
                    precision="fp32",
                    batch_size=given.batch_size,
                    max_length=given.max_length,
                )
            )
            rounds.append(
                {
                    "trainer": by_trainer(settings),
                    "loop": by_hand(settings),
                    "plan": plan(settings, given.steps).step_seconds,
                }
            )
    about = {name: getattr(given, name) for name in ("batch_size", "max_length", "steps")}
    found: dict[str, Any] = {**about, "threads": torch.get_num_threads(), "rounds": rounds}
    for peer in ("loop", "plan"):
        ratios = [each["trainer"] / each[peer] for each in rounds]
        found[f"trainer/{peer}"] = statistics.median(ratios)
        found[f"trainer/{peer}, quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / f"{given.model.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    Console().print({name: value for name, value in found.items() if name != "rounds"})


if __name__ == "__main__":
    main()
