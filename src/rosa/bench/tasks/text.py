"""Classification of your own text files: a text column, or two, and a label column."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rosa.bench.processes import say
from rosa.bench.tasks.files import read_table
from rosa.bench.tasks.metrics import accuracy_and_macro_f1
from rosa.bench.tasks.task import DataSettings, Task
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION_SHARE = 0.1
"""What is split off the training data, stratified by label, where there is no validation file."""


def load_text(settings: DataSettings, labels: tuple[str, ...] | None = None) -> Task:
    """A classification task from files; with the labels of a trained model if they are given.

    Raises:
        FileNotFoundError, ValueError: see `read_table`; also if there is only one label, or the
            validation file has labels that the training file does not.
    """
    if settings.train is None:
        raise UserError("no training file")
    texts = tuple(settings.text_columns)
    if len(texts) not in (1, 2):
        raise UserError(f"a classification takes one text column or two, got {', '.join(texts)}")
    columns = (*texts, settings.label_column)
    if len(set(columns)) < len(columns):
        raise UserError(
            f"--text-column and --label-column name one column twice: {', '.join(columns)}"
        )
    train = _plain(read_table(settings.train, columns), texts, settings.label_column)
    if labels is None:
        labels = tuple(sorted(set(train["label"]), key=lambda label: (len(label), label)))
    if len(labels) < 2:
        raise UserError(
            f"{settings.train}: column {settings.label_column!r} has one label only "
            f"({', '.join(labels)}): there is nothing to learn"
        )
    _tell_of_likenesses(labels)
    train = _with_ids(train, labels, settings.train)
    if settings.validation is None:
        train, validation = split_off(train)
    else:
        validation = _plain(read_table(settings.validation, columns), texts, settings.label_column)
        validation = _with_ids(validation, labels, settings.validation)
    return Task(
        name="text",
        kind="classification",
        train=train,
        validation=validation,
        text_columns=tuple(f"text{i}" for i in range(len(texts))),
        labels=labels,
        metric="accuracy",
        compute=accuracy_and_macro_f1,
    )


def _plain(rows: Dataset, texts: tuple[str, ...], label_column: str) -> Dataset:
    """Only the columns that are used, under names of our own."""
    from datasets import Dataset

    columns = {f"text{i}": rows[name][:] for i, name in enumerate(texts)}
    return Dataset.from_dict({**columns, "label": [_label(v) for v in rows[label_column]]})


def _label(value: str) -> str:
    """A label's name: 1, 1.0 (what tables with gaps make of 1) and " 1" are the same."""
    value = value.strip()
    return value[:-2] if re.fullmatch(r"-?\d+\.0", value) else value


def _tell_of_likenesses(labels: tuple[str, ...]) -> None:
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(" ".join(label.casefold().split()), []).append(label)
    for group in alike.values():
        if len(group) > 1:
            say(
                f"{' and '.join(map(repr, group))} are learned as {len(group)} labels: write them "
                "alike if they are one"
            )


def _with_ids(rows: Dataset, labels: tuple[str, ...], path: Path) -> Dataset:
    unknown = sorted(set(rows["label"]) - set(labels))
    if unknown:
        raise UserError(
            f"{path} has labels that are not learned: {', '.join(unknown[:5])} "
            f"(known: {', '.join(labels[:10])})"
        )
    ids = {label: i for i, label in enumerate(labels)}
    values = [ids[label] for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", values)  # type: ignore[call-arg]


def split_off(rows: Dataset, stratify: bool = True) -> tuple[Dataset, Dataset]:
    """Split a tenth of the rows off, stratified by `label` unless told; returns (rest, tenth).

    The same rows for every seed: what is chosen, or reported, on them must not be trained on.

    Raises:
        ValueError: there are too few rows.
    """
    from sklearn.model_selection import train_test_split

    labels = rows["label"][:] if stratify else [0] * len(rows)
    counts = [labels.count(label) for label in set(labels)]
    held = max(round(VALIDATION_SHARE * len(rows)), len(counts))
    if min(counts) < 2 or held > len(rows) - len(counts):
        raise UserError(
            f"too few rows to hold some out for validation: {len(rows)} to train on"
            + (f", and each of the {len(counts)} labels needs two at least" if stratify else "")
            + ". Add rows, or give a --validation file if there is none"
        )
    train, validation = train_test_split(
        range(len(rows)), test_size=held, random_state=0, stratify=labels
    )
    return rows.select(sorted(train)), rows.select(sorted(validation))
