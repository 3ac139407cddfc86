"""Tables from the result records of runs and comparisons: terminal, Markdown, CSV."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from rosa.bench import runs
from rosa.bench.cells import ERROR
from rosa.bench.compare import COMPARISON, best_record
from rosa.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


def metrics_table(title: str, record: Mapping[str, Any]) -> Table:
    """A run's record as a table of two columns."""
    from rich.table import Table

    table = Table("metric", "value", title=title)
    for name, value in record.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table


def comparison_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table with a row per method, named in the first column; numbers are right-aligned."""
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        if i:
            table.add_column(column, justify="right", no_wrap=True)
        else:  # a variant's name has no spaces to break at
            table.add_column(column, overflow="fold", min_width=10)
    for cells in rows:
        table.add_row(*cells)
    return table


@dataclass
class Row:
    """A method at a rank, at its chosen learning rate, over all seeds."""

    method: str
    rank: int | None
    lr: float
    at_edge: bool
    records: list[dict[str, Any]]
    histories: list[dict[str, Any]] = field(repr=False)

    @property
    def name(self) -> str:
        """The method with its rank."""
        return self.method if self.rank is None else f"{self.method}, r {self.rank}"

    def values(self, key: str) -> list[float]:
        """A number of every seed's record."""
        return [record[key] for record in self.records]


@dataclass
class Comparison:
    """What a comparison's folder holds.

    Attributes:
        metric: what is reported, as it is called in the records (`test_...`).
        settings: what all cells share.
        further: what is reported beside it, of other texts or sets, as it is called in the records.
        before: metrics of the pretrained model, where they were measured.
        cells: the record of every finished cell, also of learning rates that were not chosen.
        failed: names of the cells that ended with an error.
        unfinished: names of the cells that have begun and not ended.
    """

    folder: Path
    metric: str
    further: list[str]
    before: dict[str, float]
    settings: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    rows: list[Row]
    failed: list[str]
    unfinished: list[str]


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder.

    Raises:
        FileNotFoundError: it is not one.
        ValueError: no cell of it is finished, or a file is damaged.
    """
    if not (folder / COMPARISON).is_file():
        raise FileNotFoundError(f"{folder} is not a comparison's folder (no {COMPARISON})")
    groups: dict[tuple[str, int | None], list[tuple[dict[str, Any], Path]]] = {}
    failed, unfinished = [], []
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        if (place / runs.METRICS).is_file():
            record = runs.read_json(place / runs.METRICS)
            group = record.get("variant") or _variant_before(place, record), record.get("rank")
            groups.setdefault(group, []).append((record, place))
        elif (place / ERROR).is_file():
            failed.append(_shown(place.name))
        elif runs.settings_of(place):
            unfinished.append(_shown(place.name))
    if not groups:
        raise UserError(
            f"{folder} has no finished run yet: go on with it by the same `rosa compare` command"
        )
    rows = [_row(*group, cells) for group, cells in groups.items()]
    first = rows[0].records[0]
    settings = runs.read_json(folder / COMPARISON)
    # A report is for others: not where files lie on this machine.
    if settings.get("model"):
        settings["model"] = runs.model_name(settings["model"])
    for name in ("data", "train", "validation"):
        if settings.get(name):
            settings[name] = _without_machine(settings[name])
    rows.sort(key=lambda row: (row.rank or 0, row.method))
    cells = {
        _shown(place.name): {**record, "variant": _shown(variant)}
        for (variant, _), group in groups.items()
        for record, place in group
    }
    before = settings.pop("before", {})
    known = {f"{part}_{first['metric']}" for part in ("train", "eval", "test")}
    further = [k for k in first if k.endswith(f"_{first['metric']}") and k not in known]
    reported = first["reported"]
    return Comparison(folder, reported, further, before, settings, cells, rows, failed, unfinished)


def _variant_before(place: Path, record: Mapping[str, Any]) -> str:
    """The variant of a record that does not say it: of a run before records did."""
    return place.name.rsplit("-lr", 1)[0].removesuffix(f"-r{record.get('rank')}")


def _without_machine(path: str) -> str:
    """A path's last two parts if it is absolute, else the path."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _shown(variant: str) -> str:
    """The name of a variant, or of its cell, as a report says it: its own settings may be paths."""
    options = (part.partition("=") for part in unquote(variant).split("+"))
    return "+".join(f"{name}{equals}{_without_machine(value)}" for name, equals, value in options)


def _row(method: str, rank: int | None, cells: list[tuple[dict[str, Any], Path]]) -> Row:
    """Choose the learning rate by the validation metric of the seed that tried the most of them."""
    ((tuned_on, _),) = Counter(record["seed"] for record, _ in cells).most_common(1)
    tuning = [record for record, _ in cells if record["seed"] == tuned_on]
    lr = best_record(tuning)["lr"]
    rates = [record["lr"] for record in tuning]
    chosen = sorted((c for c in cells if c[0]["lr"] == lr), key=lambda cell: cell[0]["seed"])
    return Row(
        _shown(method),
        rank,
        lr,
        len(rates) > 1 and lr in (min(rates), max(rates)),
        [record for record, _ in chosen],
        [runs.read_json(place / runs.HISTORY) for _, place in chosen],
    )


COLUMNS = (
    "method",
    "rank",
    "lr",
    "seeds",
    "score",
    "spread",
    "train loss",
    "trainable",
    "file, MB",
    "peak, MiB",
    "seconds",
    "s drawing",
)


def columns(comparison: Comparison) -> tuple[str, ...]:
    """Names of the table's columns: `COLUMNS`, and one for each further metric."""
    return (*COLUMNS, *(name.replace("_", " ") for name in comparison.further))


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The numbers of the table: a dictionary with the columns' names for each row."""
    found = []
    for row in comparison.rows:
        scores = row.values(comparison.metric)
        cells = (
            row.method,
            row.rank,
            row.lr,
            len(scores),
            mean(scores),
            stdev(scores) if len(scores) > 1 else None,
            mean(row.values("train_loss")),
            row.records[0]["trainable_parameters"],
            mean(row.values("adapter_bytes")) / 1e6,
            mean(row.values("peak_memory_mib")),
            mean(row.values("train_seconds")),
            mean(row.values("resample_seconds")),
            *(mean(row.values(name)) for name in comparison.further),
        )
        names = columns(comparison)
        found.append({**dict(zip(names, cells, strict=True)), "at_edge": row.at_edge})
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is shown; * marks a learning rate at the edge of what was tried."""
    formats = {
        **dict.fromkeys(("method", "rank", "seeds"), "{}"),
        "lr": "{:g}" + ("*" if row["at_edge"] else ""),
        "score": "{:.4f}",
        "spread": "{:.4f}",
        "train loss": "{:.4f}",
        "trainable": "{:,}",
        "file, MB": "{:.2f}",
        "peak, MiB": "{:.0f}",
        "seconds": "{:.0f}",
        "s drawing": "{:.2f}",
    }
    values = [(name, value) for name, value in row.items() if name != "at_edge"]
    return ["" if v is None else formats.get(name, "{:.4f}").format(v) for name, v in values]


def shown_rows(comparison: Comparison) -> list[list[str]]:
    """The cells of the table as they are shown."""
    return [_cells(row) for row in table_rows(comparison)]


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, with the notes that it needs to be read right."""
    names = columns(comparison)
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(cells) + " |" for cells in shown_rows(comparison)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes(comparison)) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """How the table came about, and what is missing from it."""
    counts = Counter(r["test_examples"] for row in comparison.rows for r in row.records)
    examples = counts.most_common(1)[0][0]
    found = [
        f"score: {comparison.metric.removeprefix('test_').replace('_', ' ')} on the {examples} "
        "examples reported on, mean over the seeds; spread: its standard deviation over the seeds",
        "the learning rate of each row was chosen with one seed on validation data held out of the "
        "training set",
    ]
    if comparison.before:
        names = [comparison.metric, *comparison.further]
        values = [f"{n.replace('_', ' ')} {comparison.before[n]:.4f}" for n in names]
        found.append(f"before training: {', '.join(values)}")
    if any(row.at_edge for row in comparison.rows):
        found.append("* the chosen rate is the lowest or highest tried: a wider grid may do better")
    if comparison.failed:
        found.append(f"failed: {', '.join(comparison.failed)}")
    if comparison.unfinished:
        found.append(f"not finished: {', '.join(comparison.unfinished)}")
    return found


def write_report(folder: Path, say: Any, output: Path | None = None) -> None:
    """Print a comparison's table; write it as report.md, .csv and .html, and all cells as .json.

    Args:
        folder: the comparison's folder.
        say: a rich console.
        output: where the files go; None takes the folder itself.
    """
    from rosa.bench.report.page import write_page

    comparison = read_comparison(folder)
    output = output or folder
    output.mkdir(parents=True, exist_ok=True)
    names = columns(comparison)
    further = names[len(COLUMNS) :] or ("seconds",)
    narrow = ("method", "rank", "lr", "score", "spread", "trainable", *further)
    places = [names.index(name) for name in narrow]
    rows = [[cells[i] for i in places] for cells in shown_rows(comparison)]
    say.print(comparison_table(str(folder), narrow, rows))
    for note in notes(comparison):
        say.print(f"- {note}", highlight=False)
    (output / "report.md").write_text(markdown(comparison), encoding="utf-8")
    with (output / "report.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([row[name] for name in names] for row in table_rows(comparison))
    whole = {"settings": comparison.settings, "cells": comparison.cells}
    runs.write_json(output / "report.json", whole)
    write_page(comparison, output / "report.html")
    say.print(f"wrote report.md, .csv, .html, and every cell's record in report.json, to {output}")
