"""Draws docs/when-steps.svg, when-tasks.svg and results/synthetic/losses.svg from result files."""

import csv
import json
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib import pyplot

from rosa.bench.report.pictures import COLOURS, tidy  # also chooses the backend without a display

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BLUE, ORANGE, GREEN, PINK, *_, BLACK = COLOURS
ROSA, RANDOM = "rosa", "rosa+directions=orthonormal"
SHOWN = {
    "lora": ("LoRA", BLUE, "s"),
    "dora": ("DoRA", GREEN, "D"),
    ROSA: ("ROSA (the default)", ORANGE, "o"),
    RANDOM: ("ROSA, random directions", PINK, "^"),
    "full": ("full fine-tuning", BLACK, "v"),
}
REGRESSION = {
    "lora": SHOWN["lora"],
    "rosa+directions=svd": ("ROSA, singular directions", GREEN, "D"),
    RANDOM: SHOWN[RANDOM],
    ROSA: ("ROSA, the gradient's first", ORANGE, "o"),
}
LENGTHS = {length: f"shift-german-default-{length}" for length in (500, 1500, 3000, 5000)}


def scores(folder: str, method: str, rank: int | None) -> dict[int, float]:
    """By seed, the score at the rate that the table of a comparison chose; empty without a row."""
    rows = csv.DictReader((RESULTS / folder / "report.csv").open(encoding="utf-8"))
    wanted = {"method": method, "rank": "" if rank is None else str(rank)}
    row = next((r for r in rows if wanted.items() <= r.items()), None)
    if row is None:
        return {}
    return {
        cell["seed"]: cell[cell["reported"]]
        for name, cell in cells(folder, method, rank)
        if f"-lr{float(row['lr']):g}-" in name
    }


def cells(folder: str, method: str, rank: int | None) -> list[tuple[str, dict]]:
    """The records of a method at a rank, by the names of their cells."""
    found = json.loads((RESULTS / folder / "report.json").read_text(encoding="utf-8"))["cells"]
    start = f"{method}-lr" if rank is None else f"{method}-r{rank}-lr"
    return [(name, cell) for name, cell in found.items() if name.startswith(start)]


def shown_per_number(folder: str, method: str, rank: int) -> float:
    """Items that a training shows (tokens with a label, or examples) per trained number."""
    settings = json.loads((RESULTS / folder / "report.json").read_text(encoding="utf-8"))[
        "settings"
    ]
    _, cell = cells(folder, method, rank)[0]
    tokens = settings["max_length"] if cell["metric"] == "loss" else 1
    return cell["steps"] * settings["batch_size"] * tokens / cell["trainable_parameters"]


def lead(folder: str, method: str, rank: int) -> tuple[float, float]:
    """How far a method is ahead of LoRA in the mean, and the standard error of that."""
    mine, others = scores(folder, method, rank), scores(folder, "lora", rank)
    sign = -1 if cells(folder, method, rank)[0][1]["metric"] == "loss" else 1
    pairs = [sign * (mine[seed] - others[seed]) for seed in mine.keys() & others.keys()]
    error = stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    return mean(pairs), error


def steps() -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for method, (name, colour, marker) in SHOWN.items():
        rank = None if method == "full" else 4
        found = {length: scores(folder, method, rank) for length, folder in LENGTHS.items()}
        found = {length: by_seed for length, by_seed in found.items() if by_seed}
        means = [mean(by_seed.values()) for by_seed in found.values()]
        left.plot(list(found), means, color=colour, marker=marker, label=name)
        if method in ("lora", "full"):
            continue
        leads = [lead(LENGTHS[length], method, 4) for length in found]
        right.errorbar(
            list(found),
            [value for value, _ in leads],
            [error for _, error in leads],
            color=colour,
            marker=marker,
            capsize=3,
        )
    right.axhline(0, color=BLUE, lw=1)
    left.set(title="Loss on German (lower is better)", ylabel="nats a token")
    right.set(title="Ahead of LoRA by", ylabel="nats a token")
    for axes in (left, right):
        axes.set(xlabel="optimizer steps", xticks=list(LENGTHS))
        tidy(axes)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    save(figure, "when-steps.svg")


def tasks() -> None:
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(7.5, 6), layout="constrained", sharex=True
    )
    classified = {
        "CoLA, Matthews correlation": ({2: "cola-whole-2", 4: "cola-whole", 8: "cola-whole"}, BLUE),
        "Python's documentation, accuracy": (dict.fromkeys((2, 4, 8), "demo"), GREEN),
    }
    for name, (folders, colour) in classified.items():
        for rank, folder in folders.items():
            value, error = lead(folder, ROSA, rank)
            x = shown_per_number(folder, ROSA, rank)
            label = name if rank == 2 else None
            top.errorbar(x, value, error, color=colour, marker="o", capsize=3, label=label)
            top.annotate(f"r {rank}", (x, value), (6, 4), textcoords="offset points", fontsize=8)
    read = {folder: f"{length:,} steps" for length, folder in LENGTHS.items()}
    read["shift-code"] = "600 steps"
    for (folder, text), method in product(read.items(), (ROSA, RANDOM)):
        if not cells(folder, method, 4):
            continue
        value, error = lead(folder, method, 4)
        x, code = shown_per_number(folder, method, 4), folder == "shift-code"
        colour = BLACK if code else SHOWN[method][1]
        first = folder in ("shift-code", LENGTHS[500])
        label = "English prose to code" if code else f"English to German, {SHOWN[method][0]}"
        marker = "s" if code else SHOWN[method][2]
        bottom.errorbar(
            x, value, error, color=colour, marker=marker, capsize=3, label=label if first else None
        )
        if method == ROSA:
            late = text in ("3,000 steps", "5,000 steps")
            place = (8, -3) if code else (-58, -4) if late else (6, -4)
            bottom.annotate(text, (x, value), place, textcoords="offset points", fontsize=8)
    for rank in (1, 16):
        value, error = lead("shift-german-ranks", ROSA, rank)
        x = shown_per_number("shift-german-ranks", ROSA, rank)
        bottom.errorbar(x, value, error, color=ORANGE, marker="o", capsize=3)
        place = (-60, -16) if rank == 1 else (-78, -4)
        text = f"1,500 steps, r {rank}"
        bottom.annotate(text, (x, value), place, textcoords="offset points", fontsize=8)
    for axes in (top, bottom):
        axes.axhline(0, color="0.4", lw=1)
        axes.axvline(2, color="0.6", lw=1, ls=":")
        axes.set_xscale("log")
        axes.legend(frameon=False, fontsize=8, loc="lower right" if axes is top else "upper left")
        tidy(axes)
    top.set(title="ROSA ahead of LoRA by", ylabel="score")
    top.annotate(
        "from here on the default\ndraws more than once",
        (2, 0.98),
        (5, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )
    bottom.set(
        ylabel="loss, nats a token",
        xlabel="items shown in training (labels, or tokens predicted) per trained number",
    )
    save(figure, "when-tasks.svg")


def regression() -> None:
    titles = {"linear": "One linear layer", "mlp": "Two layers with a ReLU between"}
    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for axes, (model, title) in zip(panels, titles.items(), strict=True):
        folder = f"synthetic/{model}"
        for method, (name, colour, marker) in REGRESSION.items():
            found = {rank: scores(folder, method, rank).values() for rank in (1, 4, 24)}
            found = {rank: losses for rank, losses in found.items() if losses}
            means = [mean(losses) for losses in found.values()]
            spread = [
                [abs(of(losses) - mean(losses)) for losses in found.values()] for of in (min, max)
            ]
            axes.errorbar(
                list(found), means, spread, color=colour, marker=marker, capsize=3, label=name
            )
        full = mean(scores(folder, "full", None).values())
        axes.axhline(full, color=BLACK, ls="--", lw=1, label=SHOWN["full"][0])
        axes.set(title=title, xlabel="rank", xticks=[1, 4, 24], xlim=(0, 25), yscale="log")
        tidy(axes)
    panels[0].set_ylabel("test loss over the start's")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    save(figure, "results/synthetic/losses.svg")


def save(figure: pyplot.Figure, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None})
    pyplot.close(figure)


matplotlib.rcParams["svg.hashsalt"] = "rosa"  # the same file from the same numbers
steps()
tasks()
regression()
