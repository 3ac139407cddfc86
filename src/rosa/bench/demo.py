"""`rosa demo`: ROSA, LoRA and the untouched model with a new head, on a task that all can run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rosa.bench.exporting import export_folder
from rosa.bench.report import pictures
from rosa.bench.report import tables as report
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import runs
from rosa.bench.tasks.demo import model_folder
from rosa.bench.train.training import train

METHODS = {"rosa": "ROSA, rank 8", "lora": "LoRA, rank 8", "head": "new head only"}
EPOCHS, MAX_LENGTH, LR = 3.0, 28, 3e-3  # minutes on two cores


def run(output: Path, seed: int, overwrite: bool, say: Any) -> None:
    """Train the three, show them side by side, export ROSA's model and check the exports.

    Args:
        output: the folder for the runs and the picture.
        seed: of the new head, the order of the data and the draws.
        overwrite: replace the results of an earlier demo.
        say: a rich console.

    Raises:
        FileNotFoundError: the pretrained model's package is not installed.
        ValueError: `output` holds something, and `overwrite` is not given.
    """
    model = model_folder()
    say.print(
        "[bold]Which of ten standard packages does this text describe?[/] Paragraphs from Python's "
        "own documentation strings, the packages' names masked. The model is a pretrained MiniLM "
        "(22.7 M parameters); each method trains it on the same data, for the same epochs."
    )
    records, histories = {}, {}
    for method, name in METHODS.items():
        say.rule(name)
        settings = RunSettings(
            model=str(model),
            task="demo",
            output=output / method,
            method=method,
            lr=LR,
            epochs=EPOCHS,
            max_length=MAX_LENGTH,
            resample_every="epoch",  # shorter than "auto" would take, so that it is seen
            seed=seed,
        )
        records[name] = train(settings, overwrite=overwrite)
        histories[name] = runs.read_json(output / method / runs.HISTORY)
    rows = [
        (
            name,
            f"{r.scores['test_accuracy']:.3f}",
            f"{r.trainable_parameters:,}",
            f"{r.train_seconds:.0f}",
            f"{r.adapter_bytes / 1e6:.1f}",
        )
        for name, r in records.items()
    ]
    columns = ("method", "test accuracy", "trainable parameters", "seconds", "file, MB")
    say.print(report.comparison_table("rosa demo", columns, rows))
    picture = output / "loss.png"
    pictures.loss_curves(picture, histories, "accuracy", "Python documentation, ten packages")
    say.rule("Exports of the ROSA model")
    for form in ("merged", "lora"):
        place = output / f"rosa-{form}"
        if place.is_dir() and overwrite:
            shutil.rmtree(place)
        difference, _ = export_folder(output / "rosa", form, place)
        say.print(f"{form}: {place} (largest difference of logits {difference:.1e})")
    say.print(f"picture: {picture}")
    say.print(
        "One seed and one learning rate: a demonstration, not a comparison of methods. The "
        "measured comparisons are in the documentation."
    )
