"""At which optimizer steps a training draws new subspaces."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rosa.layers.adapter import Adapter

ITEMS_A_NUMBER, SHORTEST_ROUND = 2, 64
"""What "auto" goes by: items that a trained number is shown before the next draw, and the fewest
optimizer steps between two draws."""
FIRST, WATCHED = 32, 4
"""Optimizer steps before the first draw by the gradient, in a training of ten times that; and those
that are watched before it."""


@dataclass(frozen=True)
class Schedule:
    """The steps that begin with a draw.

    Attributes:
        period: optimizer steps from one draw to the next; None if there is none after the first.
        first: the step that begins with the first draw; None if there is none.
        watched: how many before that one are watched.
    """

    period: int | None = None
    first: int | None = None
    watched: int = 0

    @classmethod
    def of(
        cls, adapters: list[Adapter], period: int | None, first: int | None, auto: bool, steps: int
    ) -> Schedule:
        """The schedule of a training.

        Args:
            adapters: that it trains.
            period: see above.
            first: the first draw by the gradient, where it is given.
            auto: whether the period is, or is to be, found by `auto_period`.
            steps: of the training.
        """
        if not any(adapter.config.is_informed for adapter in adapters):
            return cls(period, period)
        soon = min(FIRST, max(steps // 10, WATCHED))
        shortest = SHORTEST_ROUND if auto else period
        half = soon if shortest is None else max(shortest // 2, 1)
        first = min(soon, half) if first is None else first
        return cls(period, first, min(WATCHED, first, half))

    def ahead(self, step: int) -> int | None:
        """Steps until the next draw, 0 if it is due; None if there is none any more."""
        if self.first is None:
            return None
        if step <= self.first:
            return self.first - step
        return None if self.period is None else (self.first - step) % self.period


def auto_period(numbers: int, items: float) -> int:
    """Optimizer steps between two draws with "auto", by trained numbers and items a step."""
    return max(math.ceil(ITEMS_A_NUMBER * numbers / items), SHORTEST_ROUND)


def period_of(every: str | int | float, epoch: int) -> int | None:
    """The period in steps, of which an epoch has so many; None for "never"."""
    if every == "never":
        return None
    if isinstance(every, int):
        return every
    return max(round((1.0 if every == "epoch" else float(every)) * epoch), 1)


def trained_numbers(adapters: list[Adapter]) -> int:
    """How many numbers of the factors are trained."""
    return sum(f.numel() for adapter in adapters for f in adapter.factors if f.requires_grad)
