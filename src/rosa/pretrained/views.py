"""How a layer's weight is a matrix, or a stack of them."""

from __future__ import annotations

from torch import Tensor, nn

from rosa.algebra.lowrank import transposed


class MatrixView:
    """A parameter of a module as a matrix (out, in), or as a stack of them (n, out, in).

    Args:
        module: whose parameter it is.
        name: the parameter's.
        transposed: whether it is stored as ([n,] in, out).
    """

    def __init__(self, module: nn.Module, name: str = "weight", transposed: bool = False) -> None:
        self.module = module
        self.name = name
        self.transposed = transposed

    @property
    def parameter(self) -> Tensor:
        """The weight itself, as it is stored."""
        own = self.module._parameters  # not what stands in for it in a pass
        return own[self.name] if self.name in own else getattr(self.module, self.name)  # type: ignore[return-value]

    @property
    def matrix(self) -> Tensor:
        """Its memory as a matrix, without gradient history: what is written there is in it."""
        return self.as_matrix(self.parameter.detach())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.matrix.shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as a matrix."""
        return transposed(weight) if self.transposed else weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix in the shape of the weight."""
        return transposed(matrix) if self.transposed else matrix
