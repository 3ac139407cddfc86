"""GLUE (Wang et al., 2018) and five tasks of SuperGLUE (Wang et al., 2019): a table and its loader.

From the hub, or from a folder of local files: GLUE's TSV, SuperGLUE's JSON lines, or the raw
release of CoLA. What is reported is the validation set, as in the papers: the test sets' labels are
not public.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.bench.tasks.metrics import (
    accuracy,
    accuracy_and_f1,
    accuracy_and_macro_f1,
    matthews_and_accuracy,
    pearson_and_spearman,
)
from rosa.bench.tasks.task import DataSettings, Metrics, Task
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

GLUE, SUPER_GLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class Source:
    """Where a split lies: its name on the hub, and its file below the task's own folder."""

    split: str
    file: str


@dataclass(frozen=True)
class GlueTask:
    """A row of the table.

    Attributes:
        folder: the task's folder in the benchmark's archive; its files may also lie in `--data`.
        columns: the text columns in the files; `hub_columns` are those on the hub if they differ.
        label: the label's column in the files.
        labels: names of the classes by id, as on the hub; empty for a regression.
        other_names: what the files call some labels.
        compute: the metrics, of which the first is what the best model is chosen by.
        more: further sets that are reported, by name.
    """

    hub: tuple[str, str]
    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    compute: Metrics
    label: str = "label"
    hub_columns: tuple[str, ...] = ()
    other_names: tuple[tuple[str, str], ...] = ()
    train: Source = Source("train", "train.tsv")
    validation: Source = Source("validation", "dev.tsv")
    more: tuple[tuple[str, Source], ...] = ()
    text: Callable[[dict[str, Any]], tuple[str, ...]] | None = None


_PAIR = ("sentence1", "sentence2")
_NLI = ("premise", "hypothesis")
_JSON_TRAIN, _JSON_VALIDATION = Source("train", "train.jsonl"), Source("validation", "val.jsonl")
_TRUTH = (("false", "no"), ("true", "yes"))

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        (GLUE, "cola"),
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        "matthews_correlation",
        matthews_and_accuracy,
        other_names=(("0", "unacceptable"), ("1", "acceptable")),
    ),
    "sst2": GlueTask(
        (GLUE, "sst2"),
        "SST-2",
        ("sentence",),
        ("negative", "positive"),
        "accuracy",
        accuracy,
        other_names=(("0", "negative"), ("1", "positive")),
    ),
    "mrpc": GlueTask(
        (GLUE, "mrpc"),
        "MRPC",
        ("#1 String", "#2 String"),
        ("not_equivalent", "equivalent"),
        "accuracy",
        accuracy_and_f1,
        label="Quality",
        hub_columns=_PAIR,
        other_names=(("0", "not_equivalent"), ("1", "equivalent")),
    ),
    "stsb": GlueTask(
        (GLUE, "stsb"), "STS-B", _PAIR, (), "pearson", pearson_and_spearman, label="score"
    ),
    "qqp": GlueTask(
        (GLUE, "qqp"),
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "accuracy",
        accuracy_and_f1,
        label="is_duplicate",
        other_names=(("0", "not_duplicate"), ("1", "duplicate")),
    ),
    "mnli": GlueTask(
        (GLUE, "mnli"),
        "MNLI",
        _PAIR,
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        accuracy,
        label="gold_label",
        hub_columns=_NLI,
        validation=Source("validation_matched", "dev_matched.tsv"),
        more=(("mismatched", Source("validation_mismatched", "dev_mismatched.tsv")),),
    ),
    "qnli": GlueTask(
        (GLUE, "qnli"),
        "QNLI",
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        "accuracy",
        accuracy,
    ),
    "rte": GlueTask(
        (GLUE, "rte"), "RTE", _PAIR, ("entailment", "not_entailment"), "accuracy", accuracy
    ),
    "wnli": GlueTask(
        (GLUE, "wnli"),
        "WNLI",
        _PAIR,
        ("not_entailment", "entailment"),
        "accuracy",
        accuracy,
        other_names=(("0", "not_entailment"), ("1", "entailment")),
    ),
    "boolq": GlueTask(
        (SUPER_GLUE, "boolq"),
        "BoolQ",
        ("question", "passage"),
        ("no", "yes"),
        "accuracy",
        accuracy,
        other_names=_TRUTH,
        train=_JSON_TRAIN,
        validation=_JSON_VALIDATION,
    ),
    "cb": GlueTask(
        (SUPER_GLUE, "cb"),
        "CB",
        _NLI,
        ("entailment", "contradiction", "neutral"),
        "accuracy",
        accuracy_and_macro_f1,
        train=_JSON_TRAIN,
        validation=_JSON_VALIDATION,
    ),
    "wic": GlueTask(
        (SUPER_GLUE, "wic"),
        "WiC",
        ("word", *_PAIR),
        ("no", "yes"),
        "accuracy",
        accuracy,
        other_names=_TRUTH,
        text=lambda row: (f"{row['word']}: {row['sentence1']}", row["sentence2"]),
        train=_JSON_TRAIN,
        validation=_JSON_VALIDATION,
    ),
}

# The diagnostic sets have no training data of their own: RTE's is what SuperGLUE prescribes.
_SUPER_RTE = GlueTask(
    (SUPER_GLUE, "rte"),
    "RTE",
    _NLI,
    ("entailment", "not_entailment"),
    "accuracy",
    accuracy,
    train=_JSON_TRAIN,
    validation=_JSON_VALIDATION,
)
DIAGNOSTICS: dict[str, GlueTask] = {
    "axb": GlueTask(
        (SUPER_GLUE, "axb"),
        "AX-b",
        _PAIR,
        _SUPER_RTE.labels,
        "matthews_correlation",
        matthews_and_accuracy,
        validation=Source("test", "AX-b.jsonl"),
    ),
    "axg": GlueTask(
        (SUPER_GLUE, "axg"),
        "AX-g",
        _NLI,
        _SUPER_RTE.labels,
        "accuracy",
        accuracy,
        validation=Source("test", "AX-g.jsonl"),
    ),
}

COLA_RAW = {
    "train": ("in_domain_train.tsv",),
    "dev": ("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
}
"""The files of CoLA's raw release; GLUE's validation set is the two dev files together."""


def load_glue(name: str, settings: DataSettings) -> Task:
    """A task of the table from the folder of its files (`--data`), or from the hub.

    Raises:
        FileNotFoundError: a file is missing, or the hub cannot be reached.
        ValueError: a file is not in the benchmark's form.
    """
    if name in DIAGNOSTICS:
        row, base = DIAGNOSTICS[name], _SUPER_RTE
        train, validation = (_load(base, s, settings) for s in (base.train, base.validation))
        test, more = _load(row, row.validation, settings), {}
    else:
        row, test = TASKS[name], None
        if name == "cola" and settings.data and (settings.data / COLA_RAW["train"][0]).is_file():
            train, validation = (_cola_raw(settings.data, COLA_RAW[s]) for s in ("train", "dev"))
        else:
            train, validation = (_load(row, s, settings) for s in (row.train, row.validation))
        more = {key: _load(row, source, settings) for key, source in row.more}
    width = 2 if row.text else len(row.columns)
    return Task(
        name=name,
        kind="classification" if row.labels else "regression",
        train=train,
        validation=validation,
        test=test,
        more=more,
        text_columns=tuple(f"text{i}" for i in range(width)),
        labels=row.labels,
        metric=row.metric,
        compute=row.compute,
    )


def _load(task: GlueTask, source: Source, settings: DataSettings) -> Dataset:
    return (
        _from_hub(task, source)
        if settings.data is None
        else _from_file(task, source, settings.data)
    )


def _from_hub(task: GlueTask, source: Source) -> Dataset:
    from datasets import load_dataset

    try:
        rows = load_dataset(*task.hub, split=source.split)
    except Exception as error:  # the client's errors differ by what went wrong
        raise FileNotFoundError(
            f"{task.folder} could not be had from the hub ({type(error).__name__}: {error}). Give "
            f"--data <folder> with its files ({source.file}, ...)"
        ) from error
    columns = task.hub_columns or task.columns
    named = (
        dict(zip(task.columns, values, strict=True))
        for values in zip(*(rows[c] for c in columns), strict=True)
    )
    return _dataset(task, list(named), list(rows["label"]))


def _from_file(task: GlueTask, source: Source, folder: Path) -> Dataset:
    places = [folder / source.file, folder / task.folder / source.file]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{places[0]} is not there, nor {places[1]}: --data must be the folder of the "
            "benchmark's files" + (", or of CoLA's raw release" if task.folder == "CoLA" else "")
        )
    if path.suffix == ".jsonl":
        from rosa.bench.tasks.files import read_table

        rows: list[dict[str, Any]] = list(read_table(path, (*task.columns, task.label)))  # type: ignore[arg-type]
    else:
        rows = _read_tsv(path, task)
    ids = {label: i for i, label in enumerate(task.labels)}
    ids |= {other: ids[label] for other, label in task.other_names}
    labels = [_label(path, str(row[task.label]), ids) for row in rows]
    return _dataset(task, rows, labels)


def _label(path: Path, value: str, ids: dict[str, int]) -> int | float:
    try:
        return ids[value.lower()] if ids else float(value)
    except (KeyError, ValueError):
        expected = ", ".join(ids) if ids else "a number"
        raise UserError(f"{path}: {value!r} is no label (expected {expected})") from None


def _dataset(
    task: GlueTask, rows: Sequence[dict[str, Any]], labels: Sequence[int | float]
) -> Dataset:
    from datasets import Dataset

    text = task.text or (lambda row: tuple(row[name] for name in task.columns))
    texts = list(zip(*(text(row) for row in rows), strict=True))
    return Dataset.from_dict({**{f"text{i}": t for i, t in enumerate(texts)}, "label": labels})


def _read_tsv(path: Path, task: GlueTask) -> list[dict[str, Any]]:
    """Rows of a TSV file of GLUE's: no quoting; CoLA's has no header; broken rows are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if task.folder == "CoLA":
        lines = [["source", task.label, "mark", *task.columns], *lines]
    if len(lines) < 2:
        raise UserError(f"{path} has no rows")
    header, *rows = lines
    missing = [name for name in (*task.columns, task.label) if name not in header]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; there are: {', '.join(header)}")
    whole = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    if len(whole) < 0.99 * len(rows):
        raise UserError(
            f"{path}: {len(rows) - len(whole)} of {len(rows)} rows do not have the "
            f"{len(header)} cells of the header: is it tab-separated, in GLUE's form?"
        )
    if len(whole) < len(rows):
        print(f"{path}: {len(rows) - len(whole)} broken rows are left out")
    return whole


def _cola_raw(folder: Path, names: tuple[str, ...]) -> Dataset:
    """CoLA's raw release: rows of source, label, author's mark and sentence; no header."""
    from datasets import concatenate_datasets

    parts = []
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is not there: --data must be CoLA's raw folder"
            )
        parts.append(_from_file(TASKS["cola"], Source("", name), folder))
    return concatenate_datasets(parts)
