"""GLUE: so far CoLA, the Corpus of Linguistic Acceptability (Warstadt et al., 2019)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from rosa.tasks import DataSettings, Task

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

COLA_TRAIN = ("in_domain_train.tsv",)
COLA_VALIDATION = ("in_domain_dev.tsv", "out_of_domain_dev.tsv")
"""The files of CoLA's raw release; GLUE's validation set is the two dev files together."""


def load_cola(settings: DataSettings) -> Task:
    """CoLA from the folder of its raw release (`--data`), or from the hub.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file is not in CoLA's raw form.
    """
    if settings.data is None:
        train, validation = _from_hub()
    else:
        train = _read_raw(settings.data, COLA_TRAIN)
        validation = _read_raw(settings.data, COLA_VALIDATION)
    return Task(
        name="cola",
        kind="classification",
        train=train,
        validation=validation,
        text_columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        metric="matthews_correlation",
        compute=matthews_and_accuracy,
    )


def matthews_and_accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Matthews correlation (0 where one class is predicted throughout) and accuracy."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    return {
        "matthews_correlation": float(matthews_corrcoef(labels, predictions)),
        "accuracy": float(accuracy_score(labels, predictions)),
    }


def _from_hub() -> tuple[Dataset, Dataset]:
    from datasets import load_dataset

    try:
        data = load_dataset("nyu-mll/glue", "cola")
    except Exception as error:  # the client's errors differ by what went wrong
        raise FileNotFoundError(
            f"CoLA could not be had from the hub ({type(error).__name__}: {error}). Give --data "
            f"<folder> with its raw files: {', '.join(COLA_TRAIN + COLA_VALIDATION)}"
        ) from error
    return data["train"], data["validation"]  # type: ignore[index]


def _read_raw(folder: Path, names: tuple[str, ...]) -> Dataset:
    """Rows of source, label, author's mark and sentence; no header and no quoting."""
    from datasets import Dataset

    sentences, labels = [], []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: --data must be CoLA's raw folder")
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
                if len(row) != 4 or row[1] not in ("0", "1"):
                    raise ValueError(
                        f"{path}, line {number + 1}: expected source, label (0 or 1), mark and "
                        f"sentence, separated by tabs; got {row}"
                    )
                labels.append(int(row[1]))
                sentences.append(row[3])
    return Dataset.from_dict({"sentence": sentences, "label": labels})
