"""What a step of `rosa train` takes, beside a bare loop of torch and beside what `rosa plan` says.

    python benchmarks/loop.py --model <folder> --task cola --data <folder> \\
        --output docs/results/loop

ROSA in all linear layers, in float32. The trainer's steps, with all that is around them (counts,
clipping, checks, callbacks, logs), the loop's (forward, backward, clipping, AdamW, schedule) and
those of transformers' own Trainer, which it is made of, are timed in turn, each without draws, and
the ratio is of the medians of one round. The plan's
seconds are a lower bound: products at the rate of a large one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from rosa.bench.planning import plan
from rosa.bench.setup.checking import check
from rosa.bench.setup.settings import RunSettings
from rosa.bench.train.preparing import prepare
from rosa.bench.train.trainer import build_trainer, collator


class Stopwatch(TrainerCallback):
    """The time when each step begins."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun.append(time.perf_counter())


def median_step(begun: list[float]) -> float:
    """Seconds of a step; the first ones, which warm up, are left out."""
    return statistics.median(b - a for a, b in itertools.pairwise(begun[3:]))


def by_trainer(settings: RunSettings) -> float:
    """Median seconds of a step of `rosa train`."""
    ready = prepare(settings)
    rows = {**ready.rows, "validation": ready.rows["validation"].select(range(1))}
    trainer, _ = build_trainer(settings, ready.task, rows, ready.model, ready.tokenizer)
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    return median_step(watch.begun)


def by_transformers(settings: RunSettings) -> float:
    """Median seconds of a step of transformers' own Trainer."""
    ready = prepare(settings)
    arguments = TrainingArguments(
        output_dir=str(settings.output / "transformers"),
        max_steps=settings.steps or 1,
        per_device_train_batch_size=settings.batch_size,
        seed=settings.seed,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to=[],
    )
    collate = collator(settings, ready.task, ready.tokenizer)
    watch = Stopwatch()
    trainer = Trainer(
        ready.model, arguments, collate, train_dataset=ready.rows["train"], callbacks=[watch]
    )
    trainer.train()
    return median_step(watch.begun)


def by_hand(settings: RunSettings) -> float:
    """Median seconds of a step of a bare loop."""
    ready = prepare(settings)
    rows = ready.rows["train"]
    loader = DataLoader(
        rows.remove_columns([c for c in rows.column_names if c not in COLUMNS]),
        settings.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(settings.seed),
        collate_fn=collator(settings, ready.task, ready.tokenizer),
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
    return median_step(begun)


COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels", "label")


def main() -> None:
    """Measure, print, and write a file of the task's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--task", required=True, help="a task of rosa train")
    parser.add_argument("--data", required=True, type=Path, help="its folder")
    parser.add_argument("--output", required=True, type=Path, help="folder for <task>.json")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=43)
    given = parser.parse_args()
    rounds: list[dict[str, float]] = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            settings = check(
                RunSettings(
                    model=given.model,
                    output=Path(folder),
                    task=given.task,
                    data=given.data,
                    target_modules=("all-linear",),
                    resample_every="never",
                    steps=given.steps,
                    precision="fp32",
                    batch_size=given.batch_size,
                    max_length=given.max_length,
                )
            )
            ways = {"trainer": by_trainer, "loop": by_hand, "transformers": by_transformers}
            seconds = {name: way(settings) for name, way in ways.items()}
            rounds.append({**seconds, "plan": plan(settings, given.steps).step_seconds})
            Console().print(rounds[-1])
    found: dict[str, Any] = {
        **{name: getattr(given, name) for name in ("batch_size", "max_length", "steps")},
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    for peer in ("loop", "transformers", "plan"):
        ratios = [each["trainer"] / each[peer] for each in rounds]
        found[f"trainer/{peer}"] = statistics.median(ratios)
        found[f"trainer/{peer}, quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / f"{given.task}.json").write_text(json.dumps(found, indent=2) + "\n")
    Console().print({name: value for name, value in found.items() if name != "rounds"})


if __name__ == "__main__":
    main()
