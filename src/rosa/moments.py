"""What becomes of an optimizer's moments of the factors when a new subspace is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rosa.errors import UserError
from rosa.optimizers import State

Moments = Literal["clear", "keep", "project"]
MOMENTS: tuple[str, ...] = get_args(Moments)

# As torch's optimizers name them: running means of the gradient, and of its square.
_MEANS = ("exp_avg", "momentum_buffer")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
# What others keep that are no moments but points: old values of the parameter, or means of them.
_SLOW = ("slow_params", "slow_param", "slow_buffer", "slow_weights")  # made with the optimizer
_POINTS = (*_SLOW, "z", "x", "ax", "p0", "x0", "lookahead_slow_buff", "master_param", "ema")


def check_moments(
    moments: str,
    states: Iterable[State] = (),
    factors: Iterable[Tensor] = (),
    averaged: bool = False,
) -> None:
    """Raise ValueError for a word of no use, or for what cannot be projected or kept.

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
            for name, value in state.get(factor, {}).items():
                _check_kept(moments, name, value, factor)


def _check_kept(moments: str, name: str, value: Any, factor: Tensor) -> None:
    if name in _POINTS:
        raise UserError(
            f"moments={moments!r}, and this optimizer holds {name}, a value of the factor itself, "
            "which would pull the new subspace toward the old one: use 'clear'"
        )
    plain = type(value) is Tensor and value.shape == factor.shape
    known = plain and name in (*_MEANS, *_SQUARES)
    if moments == "project" and not known and not _is_scalar(value):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise UserError(
            f"moments='project' knows {', '.join((*_MEANS, *_SQUARES))} of an optimizer, "
            f"and this one holds {name}{shape} ({type(value).__name__}): use 'clear'"
        )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, (bool, int, float, str))


def _of_shape(entry: Mapping[str, Any], factor: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in entry.items() if isinstance(v, Tensor) and v.shape == factor.shape}


@torch.no_grad()
def clear(state: State, a: Tensor, b: Tensor, lasts: Tensor | None = None) -> None:
    """Drop the moments of terms that were drawn anew.

    Those of the terms that stay go on, and with them the step count. So that a new term's first
    steps are no larger than others', its mean of the square begins as the mean of theirs. The
    state of an optimizer other than torch's, which may be quantized or factored, is dropped whole.
    Copies of the factor that an optimizer made when it was built, as Lookahead's, follow it.

    Args:
        state: the optimizer's.
        a: A, (r, in), as the optimizer knows it.
        b: B, (out, r).
        lasts: which terms stay, (r,), of bool; None drops all.
    """
    for factor, columns in ((a, False), (b, True)):
        entry = state.get(factor, {})
        moments = _of_shape(entry, factor)
        if moments and set(entry) <= set(_SLOW) and len(entry) == len(moments):
            for value in moments.values():
                value.copy_(factor)
            continue
        known = set(moments) <= {*_MEANS, *_SQUARES} and all(
            type(v) is Tensor if k in moments else _is_scalar(v) for k, v in entry.items()
        )
        if lasts is None or not lasts.any() or not known:
            state.pop(factor, None)
            continue
        for name, value in moments.items():
            rows = value.T if columns else value  # (r, n), a view
            stay = lasts.to(rows.device)
            rows[~stay] = 0.0 if name in _MEANS else rows[stay].mean()


@torch.no_grad()
def project(state: State, a: Tensor, b: Tensor, old_a: Tensor, old_b: Tensor) -> None:
    """Move Adam's moments from the old factors' subspace into the new one's.

    With G the weight's gradient, that of A is ``B^T G``. Where the new B is ``B M + E`` with the
    old B and the least squares' M, the new gradient is ``M^T (B^T G) + E^T G``: the running mean
    goes over by M^T, that of the square by M^T squared elementwise (as if the old directions'
    gradients were independent), and of E, which nothing was seen of, it is taken to be the mean of
    all that was seen. Likewise for B, with ``G A^T``. Step counts go on.

    Args:
        state: the optimizer's.
        a: the new A, (r, in), as the optimizer knows it.
        b: the new B, (out, r).
        old_a: the values of A before the draw.
        old_b: the values of B before the draw.
    """
    _move(state, a, *_mixing(old_b, b))
    _move(state, b, *_mixing(old_a.T, a.T), columns=True)


def _move(
    state: State, factor: Tensor, mixing: Tensor, unseen: Tensor, columns: bool = False
) -> None:
    for name, value in _of_shape(state.get(factor, {}), factor).items():
        rows = value.T if columns else value  # (r, n), a view
        if name in _MEANS:
            rows.copy_(mixing.T.to(rows.dtype) @ rows)
        else:
            mixed = mixing.T.square().to(rows.dtype) @ rows
            rows.copy_(mixed + unseen[:, None].to(rows.dtype) * rows.mean())


def _mixing(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """M (r, r) of the least squares ``new = old M``, and the share of each new column it misses."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    old, new = old.to(dtype), new.to(dtype)
    mixing = torch.linalg.pinv(old) @ new
    missed = (new - old @ mixing).square().sum(0) / new.square().sum(0).clamp_min(1e-30)
    return mixing, missed
