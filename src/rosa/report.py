"""Tables and pictures from the result records of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# Okabe and Ito's palette, which tells apart for all kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def metrics_table(title: str, record: Mapping[str, Any]) -> Table:
    """A run's record as a table of two columns."""
    from rich.table import Table

    table = Table("metric", "value", title=title)
    for name, value in record.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table


def comparison_table(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]
) -> Table:
    """A table with a row per method; numbers are right-aligned."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def loss_curves(
    path: Path, histories: Mapping[str, Mapping[str, Any]], metric: str, title: str
) -> None:
    """Write a picture: the training loss by step, and a validation metric by epoch, per run.

    Args:
        path: where it goes; the ending decides the format (.png, .svg).
        histories: name of a run -> what it left in history.json.
        metric: the validation metric of the second panel.
        title: above the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, (name, history) in zip(COLOURS, histories.items(), strict=False):
        steps, epochs = history["steps"], history["epochs"]
        left.plot([s["epoch"] for s in steps], [s["loss"] for s in steps], color=colour, label=name)
        scores = [e[f"eval_{metric}"] for e in epochs]
        right.plot([e["epoch"] for e in epochs], scores, "o-", color=colour, label=name)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel=f"validation {metric.replace('_', ' ')}")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
