"""ROSA's step: what was learned is merged, and a new subspace drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rosa.errors import UserError
from rosa.resampling.active import Active, active_adapters, check_finite, check_replicas, factors_of
from rosa.resampling.moments import check_moments, clear
from rosa.resampling.optimizers import State, averages, forget_curvature, states_of
from rosa.resampling.processes import Team, everyone
from rosa.resampling.sharing import drawn, team_of
from rosa.resampling.watching import look, warn_of_blind
from rosa.resampling.zero import Partitioned, partitioned


def resample(
    model: nn.Module,
    optimizer: Any = None,
    *,
    moments: str = "clear",
    batches: Iterable[Any] = (),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> int:
    """Merge what the active adapters have learned and draw new subspaces, layer by layer.

    The model's outputs stay the same to rounding. The factors stay the same Parameter objects;
    their gradients are dropped, and their entries in the optimizer's state are cleared, step counts
    too, unless `moments` says otherwise. Everything else that the optimizer holds, its
    parameter groups and the learning-rate schedule are left alone. Its weight decay pulls
    the factors toward zero, unless `RosaCallback` sees to it: leave it at 0. Call it between an
    optimizer step and the next forward pass. The extra memory is one layer's at a time.

    In a training of several processes all of them call it, at the same step: each layer is drawn in
    one of them for all, which takes memory for the new factors beside the old ones. What fails in
    one process fails in all.

    Args:
        model: a model with ROSA layers, wrapped or not.
        optimizer: the optimizer that trains it: torch's, one of another library that keeps its
            state as torch's do, any wrapper of it, or a list or dict of several; DeepSpeed's of
            ZeRO. Another one that keeps copies of the factors (master weights, offloading)
            is refused. None if the model is not being trained.
        moments: what becomes of the optimizer's moments of the factors, which belong to the old
            subspace: ``"clear"`` begins anew, ``"keep"`` goes on with them as they are. A
            schedule-free optimizer needs ``"clear"``: its average goes on from where the factors
            are. In ZeRO ``"clear"`` needs groups of factors alone.
        batches: for draws by the gradient, batches to find it with, instead of what was seen since
            `watch`; about four. All other parameters' gradients stay as they are,
            and so does the model's mode: in eval mode the gradient is found without dropout. Not
            with ZeRO.
        loss: takes the model and a batch and returns the loss; None is ``model(**batch).loss``.

    Returns:
        The number of weights whose subspace was drawn.

    Raises:
        ValueError: the model has no ROSA, or is merged or disabled; a factor is NaN; the optimizer
            does not hold the factors, or keeps copies of them, or holds what cannot be kept; the
            weights are sharded or offloaded, or were written into by others; a batch gives no
            loss; the processes are not in step. Nothing has been changed then.
    """
    with everyone().failing_together():
        found = active_adapters(model, optimizer)
        check_finite(found)
        check_replicas(found)
        states, parts = states_to_clear(moments, optimizer, found)
        informed = [active for active in found if active.is_informed]
        shown = iter(batches if informed else ())
        if (first := next(shown, None)) is not None:
            if parts:
                raise UserError(
                    "ZeRO would add the gradients of batches to the next step's: call "
                    "rosa.watch(model) some steps before the draw, and give no batches"
                )
            look(model, informed, chain([first], shown), loss)
    with team_of(found) as team:
        team.add_up(a.adapter.sketch.total for a in informed if a.adapter.sketch is not None)
        warn_of_blind(informed)
        _draw_anew(found, team, states)
        for part in parts:
            part.follow(factors_of(found))
            if moments == "clear":
                part.clear(factors_of(found))
    if moments == "clear":
        forget_curvature(optimizer)
    torch.clear_autocast_cache()  # else an autocast around the call would go on with old factors
    return len(found)


def _draw_anew(found: list[Active], team: Team, states: list[State]) -> None:
    """Draw in all layers, and clear the moments of each."""
    new = drawn(found, team)
    with team.failing_together():
        for active, factors in new:
            try:
                active.resample(factors)
            finally:  # the old subspace could go on without them, a new one not with them
                for state in states:
                    clear(state, active.factors)


def forget(optimizer: Any, found: list[Active]) -> None:
    """Clear an optimizer's moments of factors that a file has put into another subspace."""
    states, parts = states_to_clear("clear", optimizer, found)
    for state in states:
        clear(state, factors_of(found))
    for part in parts:
        part.clear(factors_of(found))
    forget_curvature(optimizer)


def states_to_clear(
    moments: str, optimizer: Any, found: list[Active]
) -> tuple[list[State], list[Partitioned]]:
    """The states of the optimizers that a draw clears of these, and those in ZeRO's parts.

    Raises:
        ValueError: `moments` cannot be done with them.
    """
    factors = factors_of(found)
    states, parts = states_of(optimizer, factors), partitioned(optimizer)
    stepped = [*factors, *(flat for part in parts for flat in part.parts_of(factors))]
    check_moments(moments, states, stepped, averages(optimizer, factors))
    named = {f: a.name for a in found for f in a.factors}
    for part in parts:
        part.check(named, moments)
    return states if moments == "clear" else [], parts
