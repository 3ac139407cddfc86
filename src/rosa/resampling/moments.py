"""What becomes of an optimizer's moments of the factors when a new subspace is drawn."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rosa.config import MOMENTS
from rosa.errors import UserError
from rosa.resampling.optimizers import State

# What some optimizers keep that are no moments but points: old values of the parameter, or means.
_SLOW = ("slow_params", "slow_param", "slow_buffer", "slow_weights")  # made with the optimizer
_POINTS = (*_SLOW, "z", "x", "ax", "p0", "x0", "lookahead_slow_buff", "master_param", "ema")


def check_moments(
    moments: str,
    states: Iterable[State] = (),
    factors: Iterable[Tensor] = (),
    averaged: bool = False,
) -> None:
    """Raise ValueError for a word of no use, or for what cannot be kept.

    Args:
        moments: the word.
        states: the optimizers'.
        factors: what is drawn.
        averaged: whether the optimizer is schedule-free, which its state shows after a step only.
    """
    if moments not in MOMENTS:
        raise UserError(f"moments must be one of {', '.join(MOMENTS)}; got {moments!r}")
    if moments == "clear":
        return
    if averaged:
        raise UserError(
            f"moments={moments!r}, and a schedule-free optimizer holds points between which it "
            "steps, not only moments: use 'clear'"
        )
    states = list(states)
    for factor in factors:
        for state in states:
            for name in state.get(factor, {}):
                if name in _POINTS:
                    raise UserError(
                        f"moments={moments!r}, and this optimizer holds {name}, a value of the "
                        "factor itself, which would pull the new subspace toward the old one: use "
                        "'clear'"
                    )


@torch.no_grad()
def clear(state: State, factors: Iterable[Tensor]) -> None:
    """Drop the entries of factors in an optimizer's state.

    Copies of a factor that an optimizer made when it was built, as Lookahead's, follow it instead.
    """
    for factor in factors:
        entry = state.get(factor, {})
        copies = [v for v in entry.values() if isinstance(v, Tensor) and v.shape == factor.shape]
        if copies and set(entry) <= set(_SLOW) and len(entry) == len(copies):
            for value in copies:
                value.copy_(factor)
        else:
            state.pop(factor, None)
