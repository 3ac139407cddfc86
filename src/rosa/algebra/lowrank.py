"""A matrix kept as a product of two thin ones, the precision of such products, and a check."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


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
    norms: Any = torch._foreach_norm(tensors)  # type: ignore[attr-defined]  # one call for all
    plain: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    suspects = []
    for tensor, norm in zip(tensors, norms, strict=True):
        if type(norm) is Tensor:
            plain.setdefault(norm.device, []).append((tensor, norm))
        elif not math.isfinite(norm):  # as a tensor in shards is
            suspects.append(tensor)
    for pairs in plain.values():
        fine = torch.stack([norm.float() for _, norm in pairs]).isfinite().tolist()  # waits once
        suspects += [
            tensor for (tensor, _), is_fine in zip(pairs, fine, strict=True) if not is_fine
        ]
    return all(bool(tensor.isfinite().all()) for tensor in suspects)


def transposed(matrix: Tensor) -> Tensor:
    """Of a matrix, or of each one in a stack."""
    return matrix.transpose(-2, -1)


def add_product(matrix: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """Add ``b @ a`` to a matrix, or to each one in a stack: in place, without a copy of it."""
    return matrix.addmm_(b, a) if matrix.dim() == 2 else matrix.baddbmm_(b, a)


Part = tuple[Tensor, Tensor, float | None]
"""B and A of some terms, and the sum of their squared norms where it was asked for."""


class LowRank:
    """A matrix kept as a product: ``B @ A`` with ``B`` (out, k) and ``A`` (k, in); k may be 0.

    Or a stack of such, (n, out, k) and (n, k, in). Never changed in place: whoever holds one may
    rely on it. A sum keeps the terms of its parts, and puts them side by side when someone asks for
    them.
    """

    def __init__(self, B: Tensor, A: Tensor) -> None:
        self._parts: list[Part] = [(B, A, None)]

    @classmethod
    def zero(cls, shape: Sequence[int], dtype: torch.dtype) -> LowRank:
        """The zero matrix, or stack of them, of a shape ([n,] out, in), of rank 0."""
        *stack, out_features, in_features = shape
        return cls(
            torch.zeros(*stack, out_features, 0, dtype=dtype),
            torch.zeros(*stack, 0, in_features, dtype=dtype),
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
        parts = self._parts
        if len(parts) == 1:
            return parts[0][:2]
        lefts, rights, squares = zip(*parts, strict=True)
        # Each in memory of its own: savers take tensors that share some for tied weights.
        b, a = torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2)
        self._parts = [(b, a, None if None in squares else sum(squares))]
        return b, a

    @property
    def rank(self) -> int:
        """The number of terms k (an upper bound of the rank of the matrix)."""
        return sum(a.shape[-2] for _, a, _ in self._parts)

    @property
    def size(self) -> float:
        """The root of the sum of the terms' squared norms: what rounding of the matrix goes by.

        Terms that take each other out count; of a stack that of all.
        """
        parts = self._parts
        squares = [_square(b, a) if s is None else s for b, a, s in parts]
        self._parts = [(b, a, s) for (b, a, _), s in zip(parts, squares, strict=True)]
        return math.sqrt(sum(squares))

    def __add__(self, other: LowRank) -> LowRank:
        """The sum, with the terms of both: exact, nothing is multiplied out."""
        total = LowRank.__new__(LowRank)
        total._parts = self._parts + other._parts
        return total

    def __getitem__(self, terms: slice) -> LowRank:
        """Some of the terms."""
        return LowRank(self.B[..., terms], self.A[..., terms, :])

    def padded(self, rank: int) -> LowRank:
        """The same matrix with terms of zero beside its own, `rank` of them in all."""
        more = rank - self.rank
        b, a = self.B[..., :0], self.A[..., :0, :]
        return self + LowRank(functional.pad(b, (0, more)), functional.pad(a, (0, 0, 0, more)))

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
        before = self._parts
        parts: list[Part] = [(b.to(device, dtype), a.to(device, dtype), s) for b, a, s in before]
        if all(new[0] is old[0] and new[1] is old[1] for new, old in zip(parts, before)):  # noqa: B905
            return self
        moved = LowRank.__new__(LowRank)
        moved._parts = parts
        return moved

    @full_precision()
    def dense(self) -> Tensor:
        """The matrix itself, ([n,] out, in)."""
        return self.B @ self.A

    @full_precision()
    def compressed(self, error: float = 0.0) -> LowRank:
        """The same matrix with as few terms as its numerical rank, the scale split evenly.

        A QR of each factor and an SVD of the small product, in float64. Singular values below the
        rounding of the factors' own dtype are dropped, so nothing is lost that the product held. Of
        a stack as many terms are kept as the matrix of the largest rank in it has.

        Args:
            error: relative to its Frobenius norm, up to which it may be another matrix, of fewer
                terms.
        """
        if self.rank == 0:
            return self
        q_b, r_b = torch.linalg.qr(self.B.double())
        q_a, r_a = torch.linalg.qr(transposed(self.A.double()))
        u, sizes, vh = torch.linalg.svd(r_b @ transposed(r_a), full_matrices=False)
        there = sizes > sizes[..., :1] * torch.finfo(self.B.dtype).eps
        rest = sizes.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # the norm from each one on
        there &= rest > error * rest[..., :1]
        keep = int(there.sum(-1).max())
        root = torch.where(there, sizes, 0.0)[..., :keep].sqrt()
        b = q_b @ (u[..., :keep] * root[..., None, :])
        a = root[..., None] * (vh[..., :keep, :] @ transposed(q_a))
        return LowRank(b.to(self.B.dtype).contiguous(), a.to(self.A.dtype).contiguous())


def _square(b: Tensor, a: Tensor) -> float:
    """The sum of the terms' squared norms."""
    norm = float((a.norm(dim=-1) * b.norm(dim=-2)).norm())
    return norm * norm
