"""Changes of fewer terms: the best approximation that a budget of numbers over the model buys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rosa.algebra.lowrank import LowRank
from rosa.config import check_rank
from rosa.errors import UserError


@dataclass(frozen=True)
class Budget:
    """How much of the changes is kept.

    Attributes:
        rank: so many terms for each weight in the mean, spent where they keep most; None for no
            such bound.
        uniform: that many for every weight.
        energy: the share of the changes' squared Frobenius norms, over all weights, that is kept by
            as few numbers as that takes; None for no such bound.
    """

    rank: int | None = None
    uniform: bool = False
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UserError("give a rank or an energy, not both: each says how much is kept")
        if self.rank is not None:
            check_rank("rank", self.rank)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy is a share, above 0 and at most 1: {self.energy}")
        if self.uniform and self.rank is None:
            raise UserError("uniform ranks need a rank: which one?")

    @property
    def is_all(self) -> bool:
        """Whether everything is kept."""
        return self.rank is None and self.energy is None


ALL = Budget()
"""Everything is kept."""


def within(budget: Budget, changes: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The best approximations of changes within a budget, each with a term at least.

    Args:
        budget: what is kept.
        changes: compressed ones, whose terms are singular triplets that fall in size.

    Raises:
        ValueError: the rank is beyond that of any of the weights.
    """
    if budget.rank is not None:
        full = max(min(c.B.shape[-2], c.A.shape[-1]) for c in changes.values())
        if budget.rank > full:
            raise UserError(
                f"rank {budget.rank} is beyond that of any weight here ({full}): give a smaller "
                "one, or none for the exact export"
            )
    if budget.uniform:
        assert budget.rank is not None
        return {n: _of_rank(change, budget.rank) for n, change in changes.items()}
    if budget.is_all:
        return {name: _of_rank(change, max(1, change.rank)) for name, change in changes.items()}
    ranks = _spent(budget, changes)
    return {name: _of_rank(change, ranks[name]) for name, change in changes.items()}


def relative_error(change: LowRank, kept: LowRank) -> float:
    """By how much of its Frobenius norm a compressed change differs from what is kept of it."""
    energies = _energies(change)
    total = float(energies.sum())
    return (float(energies[kept.rank :].sum()) / total) ** 0.5 if total else 0.0


def _energies(change: LowRank) -> Tensor:
    """The squared size of each term (k,); of a stack the sum over it."""
    found = change.B.double().square().sum(-2) * change.A.double().square().sum(-1)
    return found.flatten(0, -2).sum(0) if found.dim() > 1 else found


def _cost(change: LowRank) -> int:
    """The numbers of one term."""
    *stack, out_features, _ = change.B.shape
    return math.prod(stack) * (out_features + change.A.shape[-1])


def _of_rank(change: LowRank, rank: int) -> LowRank:
    return change[:rank] if change.rank >= rank else change.padded(rank)


def _spent(budget: Budget, changes: Mapping[str, LowRank]) -> dict[str, int]:
    """The rank of each: terms are taken by what a number of theirs keeps, the best first."""
    energies = {name: _energies(change) for name, change in changes.items()}
    costs = {name: _cost(change) for name, change in changes.items()}
    worth = [
        (float(energy) / costs[name], float(energy), name)
        for name, found in energies.items()
        for energy in found
    ]
    ranks = dict.fromkeys(changes, 0)
    kept, left = 0.0, sum(costs.values()) * (budget.rank or 0)
    wanted = (budget.energy or 0.0) * sum(energy for _, energy, _ in worth)
    for _, energy, name in sorted(worth, reverse=True):
        if budget.energy is not None:
            if kept >= wanted:
                break
        elif costs[name] > left:
            continue
        ranks[name] += 1
        kept += energy
        left -= costs[name]
    return {name: max(1, rank) for name, rank in ranks.items()}
