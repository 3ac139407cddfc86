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
        """Add a backward pass: the gradient of the outputs (..., out) and the inputs (..., in)."""
        dtype = next(iter(self.tests.values())).dtype
        grad = grad.reshape(-1, grad.shape[-1]).to(dtype)
        x = x.reshape(-1, x.shape[-1]).to(dtype)
        for side, test in self.tests.items():
            self._add(side, (x @ test).T @ grad if side == "left" else (grad @ test).T @ x)

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

    def directions(
        self, side: str, count: int, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Singular directions of G, (out, k) or (in, k), with orthonormal columns; k <= `count`.

        k is smaller where the gradient has fewer directions, and 0 where none was seen.

        Args:
            side: "left" or "right"; one of those that the sketch was made for.
            count: how many are wanted.
            temperature: 0 takes the largest. Above, a direction is taken with a chance that falls
                with its energy to the power of one over the temperature, without replacement.
            generator: draws by that chance.
        """
        total = self.sums[side]
        # Of the tall one: LAPACK is four times faster there than on the wide one.
        columns, sizes, _ = torch.linalg.svd(total.T, full_matrices=False)
        there = int((sizes > sizes[0] * torch.finfo(sizes.dtype).eps * max(total.shape)).sum())
        chosen = _choose(sizes[:there].square(), min(count, there), temperature, generator)
        return columns.index_select(1, chosen.to(columns.device))

    def places(
        self,
        bases: Mapping[str, Tensor],
        count: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Which columns of a basis hold the most of G's energy: places, (k,), on the CPU.

        k is `count`, or fewer where fewer hold any.

        Args:
            bases: orthonormal columns by side, (out, n) of "left" and (in, n) of "right", whose
                shares of the energy are added up where the sketch was made for both sides.
            count: how many are wanted.
            temperature: see `directions`.
            generator: see `directions`.
        """
        held = [
            (total @ bases[side].to(total.dtype)).square().sum(0)
            / total.square().sum().clamp_min(torch.finfo(total.dtype).tiny)
            for side, total in self.sums.items()
        ]
        energies = torch.stack(held).sum(0)
        there = int((energies > 0).sum())
        return _choose(energies, min(count, there), temperature, generator)

    def energies(self) -> Tensor:
        """Squares of G's largest singular values, estimated: falling, as many as were asked for."""
        total = next(iter(self.sums.values()))
        return torch.linalg.svdvals(total).square() / total.shape[0]

    def lasting(self, side: str, factor: Tensor, share: float) -> Tensor:
        """Which columns of a factor still hold as much of G's energy as a fresh direction would.

        The column with the most energy is held against the largest singular direction of G; what
        both that column and the others hold is counted once, and of the others the one with the
        most is next, against the second largest, and so on.

        Args:
            side: see `directions`.
            factor: (out, k) for the left side, (in, k) for the right one.
            share: of a singular direction's energy, from 0 to 1.

        Returns:
            (k,), of bool, on the CPU.
        """
        rest = self.sums[side].clone()
        columns = factor.to(rest.dtype)
        lengths = torch.linalg.vector_norm(columns, dim=0)
        # To the nearest that rounding tells apart: a direction that G lacks need not be held.
        eps = torch.finfo(rest.dtype).eps * max(rest.shape)
        lasts = torch.zeros(factor.shape[1], dtype=torch.bool)
        best = torch.linalg.svdvals(rest).square()[: len(lasts)]
        for wanted in share * best - eps * best[0]:
            left = torch.linalg.vector_norm(columns, dim=0)
            unit = torch.where(left > eps * lengths, columns / left, 0.0)
            energies = (rest @ unit).square().sum(0)
            energies[lasts.to(energies.device)] = -1.0
            place = int(energies.argmax())
            if energies[place] >= wanted:
                lasts[place] = True
                found = unit[:, place]
                rest = rest - torch.outer(rest @ found, found)
                columns = columns - torch.outer(found, found @ columns)
        return lasts

    def without(self, side: str, factor: Tensor) -> None:
        """Take what lies in a factor's columns, (out, k) or (in, k), out of a side's sums."""
        total = self.sums[side]
        basis = torch.linalg.qr(factor.to(total.dtype)).Q
        total -= (total @ basis) @ basis.T


def _choose(energies: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Places of the largest, or a draw by chance; see `Sketch.directions`."""
    scores = energies.log().cpu()
    if temperature:  # the Gumbel trick: the largest of log p + noise are a draw by p
        uniform = torch.rand(len(scores), generator=generator, dtype=scores.dtype)
        scores = scores / temperature - uniform.log().neg().log()
    return scores.topk(count).indices


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
