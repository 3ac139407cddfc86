"""One draw for all processes of a data-parallel training: each layer is drawn by one of them.

Singular vectors are unique up to their sign, and the last digits of a product are the machine's: so
no two processes draw the same layer. It also takes a share of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rosa.errors import UserError
from rosa.layers.drawing import Factors
from rosa.pretrained.zero3 import shape_of
from rosa.resampling import processes
from rosa.resampling.active import Active
from rosa.resampling.processes import Team


@contextmanager
def team_of(found: list[Active]) -> Iterator[Team]:
    """The team that trains these; who trains others (of other names or shapes) has one of its own.

    Raises:
        UserError: some train the same adapters, but not by the same config or not in step. Then in
            all processes.
    """
    everyone = processes.everyone()
    words = everyone.told((_names(found), _states(found)))
    others = [rank for rank, (names, _) in enumerate(words) if names != words[everyone.place][0]]
    if others and any(active.layer.base_weight.shard is not None for active in found):
        raise UserError(
            f"the processes share one model's weights, and process {everyone.place} draws other "
            f"adapters than process {others[0]}: make the same ones active in all"
        )
    for rank, (names, states) in enumerate(words):
        first, others = next((i, s) for i, (n, s) in enumerate(words) if n == names)
        if states != others:
            _raise_unlike(names, states, others, (rank, first))
    teams: dict[Any, list[int]] = {}
    for rank, (names, _) in enumerate(words):
        teams.setdefault(names, []).append(rank)
    ranks = teams[words[everyone.place][0]]
    # A group is made by all processes, also by those that are not in it.
    several = len(teams) > 1
    groups: list[Any] = [
        torch.distributed.new_group(t) for t in teams.values() if several and len(t) > 1
    ]
    group = next((g for g in groups if torch.distributed.get_rank(g) >= 0), None)
    try:
        yield Team(ranks, ranks.index(everyone.place), group)
    finally:
        if group is not None:
            torch.distributed.destroy_process_group(group)


def _names(found: list[Active]) -> tuple[Any, ...]:
    return tuple((a.name, a.adapter.name, a.adapter.shape, a.adapter.r) for a in found)


def _states(found: list[Active]) -> list[dict[str, Any]]:
    return [
        {
            "draws": active.adapter.draws,
            "watched": active.adapter.sketch is not None,
            "seed": active.adapter.config.seed,
            "directions": active.adapter.config.directions,
            "trained": active.adapter.config.trained,
            "scaling": active.adapter.scaling,
            "precision": [str(factor.dtype) for factor in active.factors],
        }
        for active in found
    ]


def _raise_unlike(names: Any, one: Any, other: Any, ranks: tuple[int, int]) -> None:
    for (layer, adapter, *_), mine, theirs in zip(names, one, other, strict=True):
        for what, value in mine.items():
            if value != theirs[what]:
                raise UserError(
                    f"the processes cannot draw together: {what} of adapter {adapter!r} in layer "
                    f"{layer} is {value} in process {ranks[0]} and {theirs[what]} in process "
                    f"{ranks[1]}. One training has one config, and calls rosa.watch and "
                    "rosa.resample in every process at the same step; trainings of their own give "
                    "their adapters other names (adapter_name)"
                )


def drawn(found: list[Active], team: Team) -> Iterable[tuple[Active, Factors]]:
    """New factors of each, the same in all processes; alone one after the other, as they are asked.

    Raises:
        UserError: one could not be drawn, in whichever process. Nothing has been changed then,
            but by one alone in the layers before it.
    """
    with team.failing_together():
        for active in found:
            active.layer.settle()
    if team.is_alone:
        return ((active, active.draw()) for active in found)
    owners = shares([_cost(active) for active in found], len(team.ranks))
    with team.failing_together():
        factors, failures = [], []
        for active, owner in zip(found, owners, strict=True):
            try:
                its = active.draw() if owner == team.place else _to_come(active)
            except Exception as error:  # the others still need what is here of sharded weights
                failures.append(error)
            else:
                factors.append(its)
        if failures:
            raise failures[0]
    for place in range(len(team.ranks)):
        its = [
            f for pair, owner in zip(factors, owners, strict=True) if owner == place for f in pair
        ]
        team.send(its, place)
    return list(zip(found, factors, strict=True))


def shares(costs: list[float], count: int) -> list[int]:
    """Who does each of some works: the costliest first, to whoever has the least to do so far."""
    owners, loads = [0] * len(costs), [0.0] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _cost(active: Active) -> float:
    """Multiplications of a draw, about."""
    adapter = active.adapter
    each = min(adapter.shape[-2:]) if adapter.config.directions == "svd" else adapter.r
    return float(math.prod(adapter.shape) * each)


def _to_come(active: Active) -> Factors:
    active.lend()
    a, b = (torch.empty(shape_of(f), dtype=f.dtype, device=f.device) for f in active.factors)
    return a, b
