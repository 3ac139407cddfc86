"""Two numbers by which a pretrained weight is known again."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rosa.algebra.lowrank import full_precision


@full_precision()
def fingerprint(weight: Tensor) -> tuple[float, float]:
    """Two numbers that tell one weight from another: ||W||_F and u^T W v for fixed random u, v.

    Unlike a hash they hardly change when the same weight is stored in another precision or
    computed on another device, so they can be compared within a tolerance; see `same_fingerprint`.
    """
    *rows, in_features = weight.shape
    u, v = _fixed_vectors(math.prod(rows), in_features)  # the rows of a stack are rows of one
    weight = weight.detach().float()
    projection = u.to(weight.device) @ (weight @ v.to(weight.device)).flatten()
    return float(torch.linalg.vector_norm(weight)), float(projection)


@functools.lru_cache(maxsize=64)
def _fixed_vectors(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    fixed = torch.Generator().manual_seed(0)
    # Whatever device and precision are torch's default while they are made: they are kept.
    how: dict[str, Any] = {"generator": fixed, "device": "cpu", "dtype": torch.float32}
    return torch.randn(out_features, **how), torch.randn(in_features, **how)


def same_fingerprint(
    first: tuple[float, float], second: tuple[float, float], eps: float, least: float = 1e-4
) -> bool:
    """Whether two fingerprints can be of the same weight, stored with a relative error of `eps`.

    `least` is the error between two devices or libraries, which is always allowed for.
    """
    tolerance = max(eps, least) * max(first[0], second[0])
    return abs(first[0] - second[0]) <= tolerance and abs(first[1] - second[1]) <= tolerance
