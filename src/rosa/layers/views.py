"""How a layer's weight is a matrix."""

from __future__ import annotations

from torch import Tensor, nn


class MatrixView:
    """The `weight` of a module as a matrix (out, in).

    Args:
        module: whose `weight` it is.
        transposed: whether it is stored as (in, out).
    """

    def __init__(self, module: nn.Module, transposed: bool = False) -> None:
        self.module = module
        self.transposed = transposed

    @property
    def parameter(self) -> Tensor:
        """The weight itself, as it is stored."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def matrix(self) -> Tensor:
        """Its memory as (out, in), without gradient history: what is written there is in it."""
        return self.as_matrix(self.parameter.detach())

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (out, in)."""
        return weight.T if self.transposed else weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the shape of the weight."""
        return matrix.T if self.transposed else matrix
