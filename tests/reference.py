"""A plain reference of the algorithm, as the paper states it, that the library is held against.

Dense float64 matrices, one weight, no offsets: the fixed part is a matrix of its own, and a
resample merges, decomposes and splits again. Written for reading, not for use.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceRosa:
    """ROSA on one weight W (out, in): W = fixed + s B A, of which A and B are trained."""

    def __init__(self, weight: Tensor, rank: int, scaling: float = 1.0) -> None:
        self.rank, self.scaling = rank, scaling
        self.fixed = weight.clone()
        self.A = torch.zeros(rank, weight.shape[1], dtype=weight.dtype, requires_grad=True)
        self.B = torch.zeros(weight.shape[0], rank, dtype=weight.dtype, requires_grad=True)

    def weight(self) -> Tensor:
        return self.fixed + self.scaling * self.B @ self.A

    def factor(self, chosen: Tensor) -> None:
        """Steps 1 and 3 of the algorithm, with these singular triplets of the merged weight."""
        with torch.no_grad():
            merged = self.weight().clone()
            u, sizes, vh = torch.linalg.svd(merged, full_matrices=False)
            self.B.copy_(u[:, chosen])
            self.A.copy_(sizes[chosen][:, None] * vh[chosen] / self.scaling)
            self.fixed = merged - self.scaling * self.B @ self.A


def best_rank_r(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by B A of a rank (Eckart and Young), as (A, B)."""
    u, sizes, vh = torch.linalg.svd(matrix, full_matrices=False)
    return vh[:rank], u[:, :rank] * sizes[:rank]
