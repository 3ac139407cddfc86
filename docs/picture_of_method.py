"""Draws docs/rosa.svg, the picture of the method in the README."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#D9DEE3"


def product(axes: Axes, x: float, colour: str, label: str) -> None:
    """A low-rank product: a tall B and a wide A."""
    axes.add_patch(Rectangle((x, 0), 0.16, 1, color=colour))
    axes.add_patch(Rectangle((x + 0.24, 0.84), 1, 0.16, color=colour))
    axes.text(x + 0.08, -0.16, "B", ha="center", va="center", color=colour, fontsize=11)
    axes.text(x + 0.74, 0.68, "A", ha="center", va="center", color=colour, fontsize=11)
    axes.text(x + 0.62, 1.17, label, ha="center", va="center", color=colour, fontsize=10)


def weight(axes: Axes, x: float, label: str, changed: int = 0) -> None:
    """A square weight, with the share of it that was changed so far."""
    axes.add_patch(Rectangle((x, 0), 1, 1, color=GREY))
    for i in range(changed):
        axes.add_patch(Rectangle((x + 0.22 * i + 0.08, 0), 0.08, 1, color=ORANGE, alpha=0.55))
        axes.add_patch(Rectangle((x, 0.78 - 0.22 * i), 1, 0.08, color=ORANGE, alpha=0.55))
    axes.text(x + 0.5, -0.16, label, ha="center", va="center", fontsize=11)


figure, rows = pyplot.subplots(2, 1, figsize=(9.5, 4.6), layout="constrained")
lora, rosa = rows
for row in rows:
    row.set(xlim=(-1.35, 7.6), ylim=(-0.4, 1.35), aspect="equal")
    row.axis("off")

lora.text(-1.3, 0.5, "LoRA", fontsize=15, weight="bold", va="center")
weight(lora, 0, "W, frozen")
lora.text(1.2, 0.5, "+", fontsize=18, ha="center", va="center")
product(lora, 1.45, BLUE, "trained, from zero")
lora.text(
    3.0, 0.5, "one product for the whole run: the change has rank r", va="center", fontsize=11
)

rosa.text(-1.3, 0.5, "ROSA", fontsize=15, weight="bold", va="center")
weight(rosa, 0, "W + O")
rosa.text(1.2, 0.5, "+", fontsize=18, ha="center", va="center")
product(rosa, 1.45, ORANGE, "trained, from the weight's own part")
arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "color": "black", "lw": 1.2}
rosa.add_patch(FancyArrowPatch((2.9, 0.45), (3.45, 0.45), **arrow))
rosa.text(3.17, 0.6, "merge", ha="center", fontsize=9)
weight(rosa, 3.6, "W + O", changed=1)
rosa.add_patch(FancyArrowPatch((4.75, 0.45), (5.3, 0.45), **arrow))
rosa.text(5.02, 0.6, "draw anew", ha="center", fontsize=9)
weight(rosa, 5.45, "after 3 rounds: rank up to 6 r", changed=3)
rosa.text(6.65, 0.45, "...", fontsize=18, va="center")

figure.savefig(
    Path(__file__).with_name("rosa.svg"),
    metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
)
