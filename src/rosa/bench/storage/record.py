"""The result of a run: what `metrics.json` in its folder holds, written and read here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from rosa.bench.storage.runs import METRICS, read_json, write_json
from rosa.errors import UserError


@dataclass(frozen=True)
class Record:
    """The result of a run.

    Attributes:
        variant: what a comparison calls the method with the settings of its own.
        method: of `rosa.bench.setup.methods.METHODS`.
        rank: None where the method has none.
        lr: peak learning rate.
        seed: of everything random.
        metric: name of the validation metric, of `scores`: the higher the better, or "loss".
        reported: name of what a comparison reports, of `scores`.
        scores: metrics by name: `eval_loss`, those of the validation set, those of further parts
            with the part's name before them (`test_accuracy`), those of the texts written.
        train_loss: mean over the last epoch's steps.
        epochs: passes over the training data.
        steps: optimizer steps.
        train_seconds: with the evaluations in between.
        resamples: draws of new subspaces.
        resample_seconds: of all of them.
        trainable_parameters: numbers trained.
        peak_memory_mib: of the device if there is one, else of the process.
        train_examples: examples trained on.
        validation_examples: examples that the epoch was chosen by.
        test_examples: examples that `reported` is of.
        adapter_bytes: size of what was saved.
    """

    variant: str
    method: str
    lr: float
    seed: int
    metric: str
    reported: str
    scores: Mapping[str, float]
    train_loss: float
    epochs: float
    steps: int
    train_seconds: float
    resamples: int
    resample_seconds: float
    trainable_parameters: int
    peak_memory_mib: float
    train_examples: int
    validation_examples: int
    test_examples: int
    adapter_bytes: int
    rank: int | None = None

    @property
    def validation(self) -> float:
        """The validation metric."""
        return self.scores[self.metric]

    def to_json(self) -> dict[str, Any]:
        """As it is stored and shown: the scores beside the fields, no rank where there is none."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scores"}
        if self.rank is None:
            del values["rank"]
        return {**self.scores, **values}

    def write(self, folder: Path) -> None:
        """Store it in a run's folder, which marks the run as finished."""
        write_json(folder / METRICS, self.to_json())


def read_record(folder: Path) -> Record:
    """The record of a finished run's folder.

    Raises:
        UserError: the file is damaged.
    """
    try:
        values = read_json(folder / METRICS)
    except UserError as error:
        raise UserError(f"{error}. Delete {folder} to train that run again") from error
    if not values.get("variant"):  # a run before records said it: its folder's name does
        name = folder.name.rsplit("-lr", 1)[0].removesuffix(f"-r{values.get('rank')}")
        values["variant"] = name
    known = [f for f in fields(Record) if f.name != "scores"]
    lacks = [f.name for f in known if f.default is MISSING and f.name not in values]
    if lacks:
        raise UserError(
            f"{folder / METRICS} lacks {', '.join(lacks)}: the file is damaged. "
            f"Delete {folder} to train that run again"
        )
    own = {f.name: values.pop(f.name) for f in known if f.name in values}
    return Record(**own, scores=values)


def best_record(records: Sequence[Record]) -> Record:
    """The run with the best validation metric; of equals that with the lower validation loss."""

    def score(record: Record) -> tuple[float, float, float]:
        loss = record.scores["eval_loss"]
        return -loss if record.metric == "loss" else record.validation, -loss, -record.lr

    return max(records, key=score)
