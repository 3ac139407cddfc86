"""A matrix kept as a product of two thin ones, the precision of such products, and a check."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor


@functools.cache
def _devices() -> set[str]:
    """The kinds of devices there are."""
    accelerator = torch.accelerator.current_accelerator()
    return {"cpu", accelerator.type if accelerator else "cpu"}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply in the tensors' own precision, whatever autocast or TF32 is on outside."""
    precision = torch.get_float32_matmul_precision()
    cast = [device for device in _devices() if torch.is_autocast_enabled(device)]
    if precision == "highest" and not cast:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with contextlib.ExitStack() as stack:
            for device in cast:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether no tensor has NaN or infinity."""
    # A norm reads a tensor once and makes no temporaries; that of large numbers can overflow.
    norms = torch._foreach_norm(tensors)  # type: ignore[attr-defined]  # one call for all
    return all(
        math.isfinite(norm) or bool(tensor.isfinite().all())
        for tensor, norm in zip(tensors, norms, strict=True)
    )


class LowRank:
    """A matrix kept as a product: ``B @ A`` with ``B`` (out, k) and ``A`` (k, in); k may be 0.

    Never changed in place: whoever holds one may rely on it. A sum keeps the terms of its parts,
    and puts them side by side when someone asks for them.
    """

    def __init__(self, B: Tensor, A: Tensor) -> None:
        self._parts = [(B, A)]

    @classmethod
    def zero(cls, out_features: int, in_features: int, dtype: torch.dtype) -> LowRank:
        """The zero matrix (out, in), of rank 0."""
        return cls(
            torch.zeros(out_features, 0, dtype=dtype), torch.zeros(0, in_features, dtype=dtype)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the factors."""
        return self._parts[0][0].dtype

    @property
    def B(self) -> Tensor:
        """The left factor, (out, k)."""
        return self._whole()[0]

    @property
    def A(self) -> Tensor:
        """The right factor, (k, in)."""
        return self._whole()[1]

    def _whole(self) -> tuple[Tensor, Tensor]:
        if len(self._parts) > 1:
            lefts, rights = zip(*self._parts, strict=True)
            # Each in memory of its own: savers take tensors that share some for tied weights.
            self._parts = [(torch.cat(lefts, dim=1), torch.cat(rights))]
        return self._parts[0]

    @property
    def rank(self) -> int:
        """The number of terms k (an upper bound of the rank of the matrix)."""
        return sum(a.shape[0] for _, a in self._parts)

    def __add__(self, other: LowRank) -> LowRank:
        """The sum, with the terms of both: exact, nothing is multiplied out."""
        total = LowRank.__new__(LowRank)
        total._parts = self._parts + other._parts
        return total

    def __getitem__(self, terms: slice) -> LowRank:
        """Some of the terms."""
        return LowRank(self.B[:, terms], self.A[terms])

    def joined(self) -> LowRank:
        """The same matrix with its terms side by side, in two blocks of memory.

        For what is kept long: many small pieces would lie about where the next step's activations
        go, and cost several times their size.
        """
        self._whole()
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRank:
        """The same matrix on a device, or in another precision."""
        parts = [(b.to(device, dtype), a.to(device, dtype)) for b, a in self._parts]
        if all(new[0] is old[0] and new[1] is old[1] for new, old in zip(parts, self._parts)):  # noqa: B905
            return self
        moved = LowRank.__new__(LowRank)
        moved._parts = parts
        return moved

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
