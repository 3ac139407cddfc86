"""Changes of fewer terms: the best approximation of a rank, or one that keeps so much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rosa.algebra.lowrank import LowRank, are_finite, transposed
from rosa.checks import check_rank
from rosa.errors import UserError
from rosa.layers.base import RosaLayer
from rosa.pretrained.weight import SUPPORTED_DTYPES


@dataclass(frozen=True)
class Budget:
    """How much of the changes is kept.

    Attributes:
        rank: so many terms for every weight, or as many as the change of most terms has if those
            are fewer and not `uniform`; None for no such bound.
        energy: the share of the changes' squared Frobenius norms, over all weights, that is kept by
            as few numbers as that takes; None for no such bound.
        uniform: all weights have one rank, the smallest that keeps as much.
        dtype: precision of the numbers; None leaves them in their own.
    """

    rank: int | None = None
    energy: float | None = None
    uniform: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UserError("give a rank or an energy, not both: each says how much is kept")
        if self.rank is not None:
            check_rank("rank", self.rank)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"energy is a share, above 0 and at most 1: {self.energy}")
        if self.dtype not in (None, *SUPPORTED_DTYPES):
            known = ", ".join(str(each).removeprefix("torch.") for each in SUPPORTED_DTYPES)
            raise UserError(f"dtype must be one of {known}; got {self.dtype!r}")

    @property
    def is_all(self) -> bool:
        """Whether everything is kept."""
        return self.rank is None and self.energy is None and self.dtype is None


ALL = Budget()
"""Everything is kept."""


def changes_within(
    budget: Budget, layers: Mapping[str, RosaLayer], adapter: str
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """What a budget keeps of an adapter's changes, by module; how much is lost, by layer's name."""
    whole = {name: layer.whole_change(adapter).compressed() for name, layer in layers.items()}
    kept = within(budget, whole)
    return kept, {layer.name: relative_error(whole[n], kept[n]) for n, layer in layers.items()}


def within(budget: Budget, changes: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The best approximations of changes within a budget, each with a term at least.

    Args:
        budget: what is kept.
        changes: compressed ones, whose terms are singular triplets that fall in size.

    Returns:
        By name what is kept, in the dtype that the changes have, whatever it was rounded to.

    Raises:
        ValueError: the rank is beyond that of any of the weights; the dtype cannot hold them.
    """
    if budget.rank is not None:
        full = max(min(c.B.shape[-2], c.A.shape[-1]) for c in changes.values())
        if budget.rank > full:
            raise UserError(
                f"rank {budget.rank} is beyond that of any weight here ({full}): give a smaller "
                "one, or none for the exact export"
            )
        most = max(1, *(change.rank for change in changes.values()))
        # Terms beyond are zeros, which only adapters that must be of one rank have a use for.
        ranks = dict.fromkeys(changes, budget.rank if budget.uniform else min(budget.rank, most))
    elif budget.energy is not None and budget.uniform:
        ranks = dict.fromkeys(changes, _rank_keeping(budget.energy, changes))
    elif budget.energy is not None:
        ranks = _keeping(budget.energy, changes)
    else:
        ranks = {name: max(1, change.rank) for name, change in changes.items()}
        if budget.uniform:
            ranks = dict.fromkeys(changes, max(ranks.values()))
    kept = {name: _of_rank(change, ranks[name]) for name, change in changes.items()}
    return {name: _rounded(change, name, budget.dtype) for name, change in kept.items()}


def relative_error(change: LowRank, kept: LowRank) -> float:
    """By how much of its Frobenius norm a compressed change differs from what is kept of it."""
    energies = _energies(change)
    total = float(energies.sum())
    lost = float(energies[kept.rank :].sum())
    there, left = change[: kept.rank], kept[: change.rank]
    if not (torch.equal(there.A, left.A) and torch.equal(there.B, left.B)):
        lost += _squared_norm(there + LowRank(-left.B, left.A))
    return (lost / total) ** 0.5 if total else 0.0


def _squared_norm(change: LowRank) -> float:
    """The squared Frobenius norm, by the terms' inner products."""
    a, b = change.A.double(), change.B.double()
    return max(0.0, float(((transposed(b) @ b) * (a @ transposed(a))).sum()))


def _rounded(change: LowRank, name: str, dtype: torch.dtype | None) -> LowRank:
    if dtype is None:
        return change
    rounded = change.to(dtype=dtype).to(dtype=change.dtype)
    if not are_finite([rounded.A, rounded.B]):
        raise UserError(
            f"{dtype} cannot hold the change of {name}, which is too large: give another"
        )
    return rounded


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


def _rank_keeping(share: float, changes: Mapping[str, LowRank]) -> int:
    """The smallest one rank for all that keeps a share."""
    energies = [_energies(change) for change in changes.values()]
    most = max(1, *(len(each) for each in energies))
    by_term = sum(functional.pad(each, (0, most - len(each))) for each in energies)
    left = torch.as_tensor(by_term).flip(0).cumsum(0).flip(0)  # from each term on
    return max(1, int((left > (1 - share) * left[0]).sum()))


def _keeping(share: float, changes: Mapping[str, LowRank]) -> dict[str, int]:
    """The rank of each: terms are taken by what a number of theirs keeps, the best first."""
    costs = {name: _cost(change) for name, change in changes.items()}
    worth = [
        (energy / costs[name], energy, name)
        for name, change in changes.items()
        for energy in _energies(change).tolist()
    ]
    ranks = dict.fromkeys(changes, 0)
    kept, wanted = 0.0, share * sum(energy for _, energy, _ in worth)
    for _, energy, name in sorted(worth, reverse=True):
        if kept >= wanted:
            break
        ranks[name] += 1
        kept += energy
    return {name: max(1, rank) for name, rank in ranks.items()}
