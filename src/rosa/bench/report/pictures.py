"""Pictures of runs and comparisons, by matplotlib."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rosa.bench.report.results import Comparison, Row

matplotlib.use("Agg")

# Okabe and Ito's palette, which tells apart for all kinds of colour vision; more after it.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"


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
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, (name, history) in zip(COLOURS, histories.items(), strict=False):
        steps, epochs = history["steps"], history["epochs"]
        left.plot([s["epoch"] for s in steps], [s["loss"] for s in steps], color=colour, label=name)
        scores = [e[f"eval_{metric}"] for e in epochs]
        right.plot([e["epoch"] for e in epochs], scores, "o-", color=colour, label=name)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel=f"validation {metric.replace('_', ' ')}")
    tidy(left)
    tidy(right)
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def of_comparison(comparison: Comparison) -> dict[str, str]:
    """A comparison's pictures as SVG text, by their titles; each readable on a phone."""
    shown = _of_one_rank(comparison.rows)
    metric = comparison.metric.removeprefix("test_").replace("_", " ")
    chosen_by = comparison.rows[0].records[0].metric
    validated = chosen_by.replace("_", " ")
    titles: dict[str, Callable[[Axes], None]] = {
        "Score against trained parameters, mean and deviation": lambda ax: _scores(
            ax, comparison, metric
        ),
        "Training loss, mean and all seeds": lambda ax: _by_step(
            ax, shown, "train_loss", "training loss"
        ),
        "Training loss against time, mean of the seeds": lambda ax: _by_time(ax, shown),
        f"Validation {validated}, mean and all seeds": lambda ax: _by_step(
            ax, shown, f"eval_{chosen_by}", f"validation {validated}"
        ),
        "Rank of the change of the weights": lambda ax: _ranks(ax, shown),
        "Singular values, one weight": lambda ax: _spectra(ax, shown),
        "Seconds of training": lambda ax: _bars(ax, shown, lambda r: r.train_seconds, "seconds"),
        "Peak memory": lambda ax: _bars(ax, shown, lambda r: r.peak_memory_mib, "MiB"),
    }
    for method in _of_several_ranks(comparison.rows):
        titles[f"Validation {validated} at every rank: {method}"] = partial(
            _by_rank, comparison=comparison, method=method
        )
    for further in comparison.further:
        title = f"Learned and forgotten: {further.replace('_', ' ')} against {metric}"
        titles[title] = partial(_learned_and_forgotten, comparison=comparison, further=further)
    return {title: _svg(draw) for title, draw in titles.items()}


def _of_one_rank(rows: Sequence[Row]) -> list[Row]:
    """The rows of the highest rank, and those without one: else the lines would be too many."""
    highest = max((row.rank or 0 for row in rows), default=0)
    return [row for row in rows if row.rank in (None, highest)]


def _of_several_ranks(rows: Sequence[Row]) -> list[str]:
    counts = Counter(row.method for row in rows)
    return [method for method, count in counts.items() if count > 1]


def _svg(draw: Any) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.6, 4.2), layout="constrained")
    draw(axes)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()


def tidy(axes: Axes) -> None:
    """A light grid, no frame at the top and right, whole epochs."""
    from matplotlib.ticker import MaxNLocator

    if axes.get_xlabel() == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    figure: Figure = axes.figure  # type: ignore[assignment]
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = 1 if max(map(len, names)) > 24 else 2
        lines = -(-len(names) // columns)
        figure.set_figheight(3.8 + 0.19 * lines)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _nothing(axes: Axes, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", wrap=True)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index // len(COLOURS) % len(MARKERS)],
        "markersize": 4,
    }


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """What falls by decades is shown so."""
    if values and 0 < 300 * min(values) < max(values):
        axes.set_yscale("log")


def _scores(axes: Axes, comparison: Comparison, metric: str) -> None:
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    for i, method in enumerate(methods):
        rows = [row for row in comparison.rows if row.method == method]
        scores = [row.scores(comparison.metric) for row in rows]
        axes.errorbar(
            [row.records[0].trainable_parameters for row in rows],
            [mean(s) for s in scores],
            [stdev(s) if len(s) > 1 else 0.0 for s in scores],
            capsize=3,
            label=method,
            **_style(i),
        )
    axes.set(xscale="log", xlabel="trained parameters", ylabel=metric)
    _scale(axes, [score for row in comparison.rows for score in row.scores(comparison.metric)])
    tidy(axes)
    _legend(axes)


def _by_step(axes: Axes, rows: Sequence[Row], key: str, label: str) -> None:
    """A line a row; ticks at the axis where the row's first seed drew new subspaces."""
    for i, row in enumerate(rows):
        curves = [[e[key] for e in history["epochs"]] for history in row.histories]
        steps = [e["step"] for e in row.histories[0]["epochs"]]
        values = list(zip(*curves, strict=False))
        style = _style(i)
        axes.plot(steps[: len(values)], [mean(v) for v in values], label=row.name, **style)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(steps[: len(values)], low, high, color=style["color"], alpha=0.12, lw=0)
        drawn = row.histories[0].get("drawn_at") or []
        height = 0.015 + 0.02 * (i % 3)  # so that ticks of several rows can be told apart
        axes.plot(drawn, [height] * len(drawn), "|", color=style["color"], ms=5, **_low(axes))
    axes.set(xlabel="optimizer step", ylabel=label)
    _scale(axes, [e[key] for row in rows for history in row.histories for e in history["epochs"]])
    tidy(axes)
    _legend(axes)


def _low(axes: Axes) -> dict[str, Any]:
    """Heights are shares of the axes, not values."""
    return {"transform": axes.get_xaxis_transform(), "zorder": 1}


def _by_rank(axes: Axes, comparison: Comparison, method: str) -> None:
    """A method's means at each of its ranks, beside what has none."""
    rows = [row for row in comparison.rows if row.method == method or row.rank is None]
    key = f"eval_{comparison.rows[0].records[0].metric}"
    shades = matplotlib.colormaps["plasma_r"]
    ranked = [row for row in rows if row.rank is not None]
    for row in rows:
        curves = [[e[key] for e in history["epochs"]] for history in row.histories]
        means = [mean(values) for values in zip(*curves, strict=False)]
        steps = [e["step"] for e in row.histories[0]["epochs"]][: len(means)]
        style: dict[str, Any] = {"color": "0.4", "ls": "--", "label": row.method}
        if row in ranked:
            shade = 0.15 + 0.8 * ranked.index(row) / len(ranked)
            style = {"color": shades(shade), "label": f"rank {row.rank}"}
        axes.plot(steps, means, **style)
    axes.set(xlabel="optimizer step", ylabel=f"validation {key[5:].replace('_', ' ')}")
    _scale(axes, [e[key] for row in rows for history in row.histories for e in history["epochs"]])
    tidy(axes)
    _legend(axes)


def _learned_and_forgotten(axes: Axes, comparison: Comparison, further: str) -> None:
    for i, method in enumerate(dict.fromkeys(row.method for row in comparison.rows)):
        rows = [row for row in comparison.rows if row.method == method]
        learned = [mean(row.scores(comparison.metric)) for row in rows]
        kept = [mean(row.scores(further)) for row in rows]
        axes.plot(learned, kept, label=method, **_style(i))
        for row, x, y in zip(rows, learned, kept, strict=True):
            if row.rank is not None:
                axes.annotate(str(row.rank), (x, y), (4, 3), textcoords="offset points", fontsize=7)
    if comparison.before:
        start = comparison.before[comparison.metric], comparison.before[further]
        axes.plot(*start, "k*", ms=10, label="before training")
    axes.set(xlabel=comparison.metric.replace("_", " "), ylabel=further.replace("_", " "))
    tidy(axes)
    _legend(axes)


def _by_time(axes: Axes, rows: Sequence[Row]) -> None:
    """The training loss over the seconds since the start: evaluation and drawing included."""
    for i, row in enumerate(rows):
        curves = [[e["train_loss"] for e in history["epochs"]] for history in row.histories]
        losses = [mean(v) for v in zip(*curves, strict=False)]
        step = row.mean(lambda record: record.train_seconds / record.steps)
        seconds = [step * e["step"] for e in row.histories[0]["epochs"]]
        axes.plot(seconds[: len(losses)], losses, label=row.name, **_style(i))
    axes.set(xlabel="seconds", ylabel="training loss")
    _scale(axes, [e["train_loss"] for r in rows for h in r.histories for e in h["epochs"]])
    tidy(axes)
    _legend(axes)


def _ranks(axes: Axes, rows: Sequence[Row]) -> None:
    found = False
    for i, row in enumerate(rows):
        medians: dict[float, list[float]] = {}
        for history in row.histories:
            for record in history.get("changes", {}).get("epochs", ()):
                medians.setdefault(record["step"], []).append(median(record["ranks"].values()))
        if medians:
            found = True
            steps = sorted(medians)
            axes.plot(steps, [mean(medians[s]) for s in steps], label=row.name, **_style(i))
    if not found:
        _nothing(axes, "no ranks were recorded")
        return
    axes.set(xlabel="optimizer step", ylabel="rank, median of the layers")
    axes.set_ylim(bottom=0)
    tidy(axes)
    _legend(axes)


def _spectra(axes: Axes, rows: Sequence[Row]) -> None:
    found = [(i, row, row.histories[0].get("changes")) for i, row in enumerate(rows)]
    found = [(i, row, changes) for i, row, changes in found if changes and changes["spectra"]]
    if not found:
        _nothing(axes, "no spectra were recorded")
        return
    counts = Counter(name for _, _, changes in found for name in changes["spectra"])
    layer = counts.most_common(1)[0][0]  # methods may change others
    found = [each for each in found if layer in each[2]["spectra"]]
    weight = found[0][2]["spectra"][layer]["weight"]
    places = range(1, len(weight) + 1)
    axes.plot(places, weight, color="0.6", lw=2, label="pretrained weight")
    smallest = weight[0] * 1e-6
    for i, row, changes in found:
        values = [max(v, smallest) for v in changes["spectra"][layer]["change"]]
        axes.plot(places, values, color=_style(i)["color"], label=f"change by {row.name}")
    axes.set(xscale="log", yscale="log", xlabel="place", ylabel="singular value", title=layer)
    axes.title.set_fontsize(8)
    tidy(axes)
    _legend(axes)


def _bars(axes: Axes, rows: Sequence[Row], value: Any, label: str) -> None:
    names = [row.name for row in rows][::-1]
    values = [row.mean(value) for row in rows][::-1]
    colours = [_style(i)["color"] for i in range(len(rows))][::-1]
    bars = axes.barh(range(len(rows)), values, color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    tidy(axes)
