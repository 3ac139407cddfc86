"""Where the loss gradient of a weight lies, seen through a few random projections of it.

Ordinary backward passes compute, for a linear layer, the gradient g (n, out) of its outputs and
know its inputs x (n, in). The weight's gradient G = g^T x (out, in) is never formed: for a random
Gaussian T (in, p), ``g^T (x T) = G T`` costs what LoRA of rank p costs, and its column space is
nearly that of G's p largest left singular directions. Likewise ``(g T)^T x`` with T (out, p) and
the right ones.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011),
section 4 (the range finder).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Projections beyond the rank: with these the error is within a small factor of the smallest."""


class Sketch:
    """Sums ``(G T)^T`` over backward passes, or ``T^T G`` for the right side.

    Args:
        out_features: of the layer.
        in_features: of the layer.
        rank: how many directions will be asked of it.
        left: whether they are the outputs' or the inputs'.
        generator: draws the projections.
        like: a tensor of the precision and on the device to sum in.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        left: bool,
        generator: torch.Generator,
        like: Tensor,
    ) -> None:
        width = min(rank + OVERSAMPLING, out_features, in_features)
        seen, other = (out_features, in_features) if left else (in_features, out_features)
        test = torch.randn(other, width, generator=generator, dtype=like.dtype)
        self.left = left
        self.test = test.to(like.device)
        self.sum = like.new_zeros(width, seen)

    def add(self, grad: Tensor, x: Tensor) -> None:
        """Add a backward pass: the gradient of the outputs (..., out) and the inputs (..., in)."""
        grad = grad.reshape(-1, grad.shape[-1]).to(self.sum.dtype)
        x = x.reshape(-1, x.shape[-1]).to(self.sum.dtype)
        found = (x @ self.test).T @ grad if self.left else (grad @ self.test).T @ x
        # A pass that overflowed, as under loss scaling, is left out: without a wait for the device.
        self.sum += torch.where(torch.isfinite(found).all(), found, 0.0)

    def directions(self, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Singular directions of G, (out, k) or (in, k), with orthonormal columns; k <= `count`.

        k is smaller where the gradient has fewer directions, and 0 where none was seen.

        Args:
            count: how many are wanted.
            temperature: 0 takes the largest. Above, a direction is taken with a chance that falls
                with its energy to the power of one over the temperature, without replacement.
            generator: draws by that chance.
        """
        # Of the tall one: LAPACK is four times faster there than on the wide one.
        columns, sizes, _ = torch.linalg.svd(self.sum.T, full_matrices=False)
        there = int((sizes > sizes[0] * torch.finfo(sizes.dtype).eps * max(self.sum.shape)).sum())
        scores = 2 * sizes[:there].log().cpu()
        if temperature:  # the Gumbel trick: the largest of log p + noise are a draw by p
            uniform = torch.rand(there, generator=generator, dtype=scores.dtype)
            scores = scores / temperature - uniform.log().neg().log()
        chosen = scores.topk(min(count, there)).indices
        return columns.index_select(1, chosen.to(columns.device))


class Watch(torch.autograd.Function):
    """Hands its first argument on; going backward, adds that one's gradient to a sketch.

    The input is kept for the backward pass by autograd's own means, so gradient checkpointing and
    offloading of what is saved work as for any layer.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, sketch: Sketch) -> Tensor:
        """Keep the input (..., in) of a layer with the outputs `out` (..., out)."""
        ctx.save_for_backward(x)
        ctx.sketch = sketch
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Add to the sketch; the gradient goes on as it is."""
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.sketch.add(grads[0].detach(), x.detach())
        return grads[0], None, None
