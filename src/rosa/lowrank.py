"""A matrix kept as a product of two thin ones, and the precision that such products are made in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply in the tensors' own precision, whatever autocast or TF32 is on outside."""
    precision = torch.get_float32_matmul_precision()
    accelerator = torch.accelerator.current_accelerator()
    torch.set_float32_matmul_precision("highest")
    try:
        with contextlib.ExitStack() as stack:
            for device in {"cpu", accelerator.type if accelerator else "cpu"}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class LowRank:
    """A matrix kept as a product: ``B @ A`` with ``B`` (out, k) and ``A`` (k, in); k may be 0.

    Never changed in place: whoever holds one may rely on it.
    """

    B: Tensor
    A: Tensor

    @classmethod
    def zero(cls, out_features: int, in_features: int, dtype: torch.dtype) -> LowRank:
        """The zero matrix (out, in), of rank 0."""
        return cls(
            torch.zeros(out_features, 0, dtype=dtype), torch.zeros(0, in_features, dtype=dtype)
        )

    @property
    def rank(self) -> int:
        """The number of terms k (an upper bound of the rank of the matrix)."""
        return self.A.shape[0]

    def __add__(self, other: LowRank) -> LowRank:
        """The sum, with the terms of both: exact, nothing is multiplied out."""
        return LowRank(torch.cat([self.B, other.B], dim=1), torch.cat([self.A, other.A], dim=0))

    def to(self, device: torch.device | str) -> LowRank:
        """The same matrix on a device."""
        return LowRank(self.B.to(device), self.A.to(device))

    @full_precision()
    def dense(self) -> Tensor:
        """The matrix itself, (out, in)."""
        return self.B @ self.A

    @full_precision()
    def compressed(self) -> LowRank:
        """The same matrix with as few terms as its numerical rank, the scale split evenly.

        A QR of each factor and an SVD of the small product, in float64. Singular values below the
        rounding of the factors' own dtype are dropped, so nothing is lost that the product held.
        """
        if self.rank == 0:
            return self
        q_b, r_b = torch.linalg.qr(self.B.double())
        q_a, r_a = torch.linalg.qr(self.A.double().T)
        u, sizes, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        keep = int((sizes > sizes[0] * torch.finfo(self.B.dtype).eps).sum())
        root = sizes[:keep].sqrt()
        return LowRank(
            (q_b @ (u[:, :keep] * root)).to(self.B.dtype).contiguous(),
            (root[:, None] * (vh[:keep] @ q_a.T)).to(self.A.dtype).contiguous(),
        )
