"""Tables from the result records of runs and comparisons: terminal, Markdown, CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rosa.bench.report.results import Comparison

if TYPE_CHECKING:
    from rich.table import Table


def metrics_table(title: str, record: Mapping[str, Any]) -> Table:
    """A run's record as a table of two columns."""
    from rich.table import Table

    table = Table("metric", "value", title=title)
    for name, value in record.items():
        table.add_row(name, _score(value) if isinstance(value, float) else str(value))
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
        scores = row.scores(comparison.metric)
        cells = (
            row.method,
            row.rank,
            row.lr,
            len(scores),
            mean(scores),
            stdev(scores) if len(scores) > 1 else None,
            row.mean(lambda record: record.train_loss),
            row.records[0].trainable_parameters,
            row.mean(lambda record: record.adapter_bytes / 1e6),
            row.mean(lambda record: record.peak_memory_mib),
            row.mean(lambda record: record.train_seconds),
            row.mean(lambda record: record.resample_seconds),
            *(mean(row.scores(name)) for name in comparison.further),
        )
        names = columns(comparison)
        found.append({**dict(zip(names, cells, strict=True)), "at_edge": row.at_edge})
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is shown; * marks a learning rate at the edge of what was tried."""
    formats = {
        **dict.fromkeys(("method", "rank", "seeds"), "{}"),
        "lr": "{:g}" + ("*" if row["at_edge"] else ""),
        "trainable": "{:,}",
        "file, MB": "{:.2f}",
        "peak, MiB": "{:.0f}",
        "seconds": "{:.0f}",
        "s drawing": "{:.2f}",
    }
    values = [(name, value) for name, value in row.items() if name != "at_edge"]
    return [
        "" if v is None else formats[name].format(v) if name in formats else _score(v)
        for name, v in values
    ]


def _score(value: float) -> str:
    """Of one below a thousandth the first digits that it has."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def shown_rows(comparison: Comparison) -> list[list[str]]:
    """The cells of the table as they are shown."""
    return [_cells(row) for row in table_rows(comparison)]


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, with the notes that it needs to be read right."""
    names = columns(comparison)
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    rows = ([cell.replace("|", "\\|") for cell in cells] for cells in shown_rows(comparison))
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes(comparison)) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """How the table came about, and what is missing from it."""
    counts = Counter(r.test_examples for row in comparison.rows for r in row.records)
    examples = counts.most_common(1)[0][0]
    found = [
        f"score: {comparison.metric.removeprefix('test_').replace('_', ' ')} on the {examples} "
        "examples reported on, mean over the seeds; spread: its standard deviation over the seeds",
        "where several learning rates were tried, a row's was chosen with one seed on validation "
        "data held out of the training set",
    ]
    if untuned := [row.name for row in comparison.rows if row.rates == 1]:
        found.append(f"no other rate was tried of {'; '.join(untuned)}")
    if comparison.before:
        names = [comparison.metric, *comparison.further]
        values = [f"{n.replace('_', ' ')} {_score(comparison.before[n])}" for n in names]
        found.append(f"before training: {', '.join(values)}")
    if any(row.at_edge for row in comparison.rows):
        found.append("* the chosen rate is the lowest or highest tried: a wider grid may do better")
    if comparison.failed:
        found.append(f"failed: {', '.join(comparison.failed)}")
    if comparison.unfinished:
        found.append(f"not finished: {', '.join(comparison.unfinished)}")
    return found
