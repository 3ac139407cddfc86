"""How an adapter's factors are drawn: by its config, from the weight, and by the gradient.

To draw and to take what was drawn are two steps: in a training of several processes one draws for
all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from rosa.algebra import subspace
from rosa.algebra.lowrank import LowRank, are_finite
from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.layers.adapter import Adapter
from rosa.pretrained.sharding import write

Factors = tuple[Tensor, Tensor]
"""A ([n,] r, in) and B ([n,] out, r)."""
SIDES = {"both": None, "A": "left", "B": "right"}
"""Whose directions are drawn: those that the factor that stays holds."""
_FROM_FILE: ContextVar[bool] = ContextVar("_FROM_FILE", default=False)


@contextlib.contextmanager
def from_file() -> Iterator[None]:
    """While an adapter is made that a file will fill: nothing is drawn for it."""
    token = _FROM_FILE.set(True)
    try:
        yield
    finally:
        _FROM_FILE.reset(token)


def waits_for_file(config: RosaConfig) -> bool:
    """Whether a new adapter is to be left undrawn: its file brings its factors."""
    return config.inference_mode or _FROM_FILE.get()


@torch.no_grad()
def draw(adapter: Adapter, weight: Tensor, norm: float, change: LowRank | None = None) -> Factors:
    """Draw new factors for an adapter, as it will store them; the adapter stays as it is.

    Args:
        adapter: its config and the count of its draws decide.
        weight: ([n,] out, in), in float32 or float64; not changed.
        norm: the Frobenius norm of the pretrained weight.
        change: to be added to the weight first.

    Raises:
        ValueError: the weight could not be decomposed.
    """
    config, sketch = adapter.config, adapter.sketch
    try:
        drawn = subspace.draw(
            weight,
            adapter.r,
            directions=config.directions,  # type: ignore[arg-type]  # checked by RosaConfig
            scaling=adapter.scaling,
            change=change,
            # Of the pretrained weight: the speed of learning does not drift with the training.
            size=subspace.root_mean_square_size(norm, weight.shape),
            side=SIDES[config.trained],
            known=None if sketch is None else sketch.directions(adapter.r, like=weight),
            generator=subspace.generator(
                config.seed, f"{adapter.layer}.{adapter.name}", adapter.draws
            ),
        )
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise UserError(
            f"no subspace of layer {adapter.layer} could be drawn ({error}): check its weight for "
            "NaN and infinity, or use directions='orthonormal'"
        ) from error
    if not are_finite([*drawn]):
        raise UserError(
            f"the weight of layer {adapter.layer} has NaN or infinity, and so would a subspace of "
            "it: load the base model again, or leave the layer out with exclude_modules"
        )
    a, b = (new.to(old.device, old.dtype) for new, old in zip(drawn, adapter.factors, strict=True))
    return a, b


@torch.no_grad()
def take(adapter: Adapter, drawn: Factors) -> LowRank:
    """Let an adapter go on with new factors; returns what takes their product out of the weight.

    What the adapter's sketch saw is used up.
    """
    for factor, values in zip(adapter.factors, drawn, strict=True):
        write(factor, values)
    adapter.draws += 1
    adapter.sketch = None
    # From the factors as they are now stored: their rounding cancels too.
    start = adapter.learned()
    if adapter.config.directions == "zero":
        return start[:0]
    return LowRank(-start.B, start.A)
