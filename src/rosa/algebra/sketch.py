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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Projections beyond the rank: with these the error is within a small factor of the smallest."""


class Sketch:
    """Sums ``(G T)^T`` over backward passes, for the left side, and ``T^T G`` for the right one.

    Args:
        out_features: of the layer.
        in_features: of the layer.
        ranks: how many directions will be asked of a side: "left" (the outputs'), "right" (the
            inputs'); 0 leaves it out.
        generator: draws the projections.
        like: a tensor of the precision and on the device to sum in.

    Attributes:
        sums: by side; (p, out) of the left one and (p, in) of the right one.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        ranks: Mapping[str, int],
        generator: torch.Generator,
        like: Tensor,
    ) -> None:
        self.tests: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        sizes = {"left": (out_features, in_features), "right": (in_features, out_features)}
        for side, rank in ranks.items():
            if rank:
                seen, other = sizes[side]
                width = min(rank + OVERSAMPLING, seen, other)
                test = torch.randn(other, width, generator=generator, dtype=like.dtype)
                self.tests[side] = test.to(like.device)
                self.sums[side] = like.new_zeros(width, seen)

    def add(self, grad: Tensor, x: Tensor) -> None:
        """Add a backward pass.

        Args:
            grad: the gradient of the outputs, (..., out).
            x: the inputs, (..., in); or the indices (...) of inputs that are one-hot.
        """
        dtype = next(iter(self.tests.values())).dtype
        grad = grad.reshape(-1, grad.shape[-1]).to(dtype)
        one_hot = not x.is_floating_point()
        x = x.flatten() if one_hot else x.reshape(-1, x.shape[-1]).to(dtype)
        for side, test in self.tests.items():
            if side == "left":
                self._add(side, (test[x] if one_hot else x @ test).T @ grad)
            elif one_hot:
                sums = torch.zeros_like(self.sums[side])
                self._add(side, sums.index_add_(1, x, (grad @ test).T))
            else:
                self._add(side, (grad @ test).T @ x)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add a gradient of the weight itself, (out, in)."""
        gradient = gradient.to(next(iter(self.tests.values())).dtype)
        for side, test in self.tests.items():
            self._add(side, (gradient @ test).T if side == "left" else test.T @ gradient)

    def _add(self, side: str, found: Tensor) -> None:
        # A pass that overflowed, as under loss scaling, is left out: without a wait for the device.
        self.sums[side] += torch.where(torch.isfinite(found).all(), found, 0.0)

    def is_empty(self) -> bool:
        """Whether no gradient was seen."""
        return not any(total.any() for total in self.sums.values())

    def directions(self, side: str, count: int) -> Tensor:
        """The largest singular directions of G, (out, k) or (in, k), with orthonormal columns.

        k is `count`; smaller where the gradient has fewer directions, and 0 where none was seen.

        Args:
            side: "left" or "right"; one of those that the sketch was made for.
            count: how many are wanted.
        """
        total = self.sums[side]
        # Of the tall one: LAPACK is four times faster there than on the wide one.
        columns, sizes, _ = torch.linalg.svd(total.T, full_matrices=False)
        there = int((sizes > sizes[0] * torch.finfo(sizes.dtype).eps * max(total.shape)).sum())
        return columns[:, : min(count, there)]


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
        ctx.mark_dirty(out)  # handed on as it is: a model may change it in place, but not a view
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Add to the sketch; the gradient goes on as it is."""
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.sketch.add(grads[0].detach(), x.detach())
        return grads[0], None, None
