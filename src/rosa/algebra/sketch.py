"""Where the loss gradient of a weight lies, seen through a few random projections of it.

Ordinary backward passes compute, for a linear layer, the gradient g (n, out) of its outputs and
know its inputs x (n, in). The weight's gradient G = g^T x (out, in) is never formed: for random T
(in, p) with orthonormal columns, ``g^T (x T) = G T`` costs what LoRA of rank p costs, and its
column space is nearly that of G's p largest left singular directions; it is exactly that at p = in.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
section 4 (the range finder).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rosa.algebra.lowrank import transposed

OVERSAMPLING = 8
"""Projections beyond the rank: with these the error is within a small factor of the smallest."""


class Sketch:
    """Sums ``(G T)^T`` over backward passes.

    Args:
        shape: of the weight as a matrix, (out, in), or as a stack of them, (n, out, in).
        rank: how many directions will be asked for.
        generator: draws the projections.
        like: a tensor of the precision and on the device to sum in.

    Attributes:
        test: T, (in, p).
        total: ([n,] p, out), the sum.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        generator: torch.Generator,
        like: Tensor,
    ) -> None:
        *stack, out_features, in_features = shape
        width = min(rank + OVERSAMPLING, out_features, in_features)
        test = torch.randn(in_features, width, generator=generator, dtype=like.dtype)
        self.test = torch.linalg.qr(test).Q.to(like.device)
        self.total = like.new_zeros(*stack, width, out_features)

    def add(self, grad: Tensor, x: Tensor) -> None:
        """Add a backward pass.

        Args:
            grad: the gradient of the outputs, (..., out).
            x: the inputs, (..., in); or the indices (...) of inputs that are one-hot.
        """
        test = self.test.to(grad.device)
        grad = grad.reshape(-1, grad.shape[-1]).to(test.dtype)
        if x.is_floating_point():
            projected = x.reshape(-1, x.shape[-1]).to(test.dtype) @ test
        else:
            projected = test[x.flatten()]
        self.add_projected(projected.T @ grad)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add a gradient of the weight itself, ([n,] out, in)."""
        self.add_projected(transposed(gradient.to(self.test.dtype) @ self.test))

    def add_projected(self, found: Tensor) -> None:
        """Add ``(G T)^T``, ([n,] p, out), of a gradient G."""
        # A pass that overflowed, as under loss scaling, is left out: without a wait for the device.
        self.total += torch.where(torch.isfinite(found).all(), found, 0.0).to(self.total.device)

    def is_empty(self) -> bool:
        """Whether no gradient was seen."""
        return not self.total.any()

    def directions(self, count: int, like: Tensor) -> Tensor | list[Tensor]:
        """The largest left singular directions of G, (out, k), with orthonormal columns.

        k is `count`; smaller where the gradient has fewer directions, and 0 where none was seen. In
        the precision and on the device of `like`; of a stack a list of them.
        """
        if self.total.dim() > 2:
            return [_directions(total, count).to(like) for total in self.total]
        return _directions(self.total, count).to(like)


def _directions(total: Tensor, count: int) -> Tensor:
    # Of the tall one: LAPACK is four times faster there than on the wide one.
    columns, sizes, _ = torch.linalg.svd(total.T, full_matrices=False)
    least = sizes[0] * torch.finfo(sizes.dtype).eps * max(total.shape)
    there = int((sizes > least).sum())
    return columns[:, : min(count, there)]


class Watch(torch.autograd.Function):
    """Hands its first argument on; going backward, adds that one's gradient to a sketch.

    The input is kept for the backward pass by autograd's own means, so gradient checkpointing and
    offloading of what is saved work as for any layer.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, look: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Keep the input x of a layer with the outputs `out`, of whose gradient `look` is told."""
        ctx.save_for_backward(x)
        ctx.look = look
        ctx.mark_dirty(out)  # handed on as it is: a model may change it in place, but not a view
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Look; the gradient goes on as it is."""
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.look(grads[0].detach(), x.detach())
        return grads[0], None, None
