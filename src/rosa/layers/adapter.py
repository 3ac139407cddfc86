"""One adapter on one weight: its settings, its factors, and what it has done to the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rosa.algebra import subspace
from rosa.algebra.lowrank import LowRank
from rosa.algebra.sketch import Sketch, Watch
from rosa.config import RosaConfig
from rosa.pretrained.sharding import cut_dim, own_part, whole, write


class Adapter:
    """An adapter's part in one layer: it adds O + s B A to the weight.

    Args:
        name: the adapter's.
        layer: the layer's name in the model, for the draws and for messages.
        config: its settings.
        r: the rank here; at most the smaller side's.
        alpha: for the scaling; None scales by 1.
        shape: of the weight, ([n,] out, in).
        dtype: of the offset.
        factors: the layer's dictionaries of A ([n,] r, in) and B ([n,] out, r), in which it puts
            its own.

    Attributes:
        scaling: the factor s.
        terms: the offset O, what earlier draws have done to the weight less what was taken out.
        draws: subspaces drawn so far: the whole random state.
        merged: whether the whole change O + s B A stands in the weight in memory.
        sketch: where the gradient lies, while that is watched.
    """

    def __init__(
        self,
        name: str,
        layer: str,
        config: RosaConfig,
        r: int,
        alpha: float | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        factors: tuple[nn.ParameterDict, nn.ParameterDict],
    ) -> None:
        self.name, self.layer, self.config = name, layer, config
        *stack, out_features, in_features = self.shape = shape
        self.r = r = min(r, out_features, in_features)
        self.alpha = alpha
        self.scaling = 1.0 if alpha is None else alpha / r
        self.terms = LowRank.zero(shape, dtype)
        self.draws = 0
        self.merged = False
        self.sketch: Sketch | None = None
        self._factors = of_a, of_b = factors
        of_a[name] = nn.Parameter(torch.zeros(*stack, r, in_features))
        of_b[name] = nn.Parameter(torch.zeros(*stack, out_features, r))

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ([n,] r, in) and B ([n,] out, r)."""
        of_a, of_b = self._factors
        return of_a[self.name], of_b[self.name]

    @property
    def stays(self) -> tuple[str, ...]:
        """Which of its layer's dictionaries hold a factor that is not trained."""
        return {"both": (), "A": ("rosa_B",), "B": ("rosa_A",)}[self.config.trained]

    @property
    def is_on_meta(self) -> bool:
        """Whether the factors have no memory yet."""
        return self.factors[0].is_meta

    def place(self, weight: Tensor, device: torch.device | None = None, cast: bool = False) -> None:
        """Bring the factors to a weight's device; those without memory have none.

        Args:
            weight: whose device and precision.
            device: another device.
            cast: to the weight's precision; else they keep theirs, or take a finer one.
        """
        a, b = self.factors
        finer = torch.promote_types(a.dtype, b.dtype)  # a file may have one in more bits
        for factor in (a, b):
            if factor.is_meta or weight.is_meta:
                continue
            dtype = torch.promote_types(finer, weight.dtype)
            if cast and weight.dtype.is_floating_point:
                dtype = weight.dtype
            factor.data = factor.data.to(weight.device if device is None else device, dtype)

    def cut_as(self, weight: Tensor) -> None:
        """Let the factors lie as a weight does that tensor parallelism has cut."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        how: Any = weight
        cuts = (Replicate(), Shard(0)) if cut_dim(weight) == 0 else (Shard(1), Replicate())
        for factors, cut in zip(self._factors, cuts, strict=True):
            whole = factors[self.name]
            spread = distribute_tensor(whole.detach(), how.device_mesh, [cut], src_data_rank=None)
            # Not by setattr, which makes another on the meta device of it under low_cpu_mem_usage.
            factors._parameters[self.name] = nn.Parameter(spread, whole.requires_grad)

    @torch.no_grad()
    def learned(self) -> LowRank:
        """The current factors' product s B A: a copy, in the offset's dtype, on their device.

        Of factors that are sharded all processes must ask for it.
        """
        a, b = map(whole, self.factors)
        dtype = self.terms.dtype
        return LowRank(b.to(dtype) * self.scaling, a.to(dtype, copy=True))

    def change(self) -> LowRank:
        """All that the adapter changes about the pretrained weight: O + s B A, in main memory."""
        return self.terms + self.learned().to("cpu")

    def next_terms(self, change: LowRank, most: float, error: float) -> LowRank:
        """The offset after a draw: with the r terms that were learned, and those taken out anew.

        A factor that stayed is the same in what was learned and in what was taken out before it:
        there these are r terms together, not 2 r.

        Args:
            change: what was learned, and what is taken out.
            most: with more terms than this it is compressed; and again where it has half as many
                more, since that is not done at every draw, but never with more than that of what
                any matrix of the shape needs.
            error: that compressing it may make, relative to all that was learned.
        """
        terms, r, last = self._joined(change), self.r, 1.5 * min(self.shape[-2:])
        while most < min(self.terms.rank, last):
            most = min(1.5 * most, last)
        if terms.rank > most:
            settled = terms.rank - (change.rank - r)  # what was drawn stays last: see `drawn`
            terms = terms[:settled].compressed(error) + terms[settled:]
        return terms

    def _joined(self, change: LowRank) -> LowRank:
        terms, r = self.terms, self.r
        if self.config.trained == "both" or terms.rank < r:
            return terms + change
        before, learned = terms[-r:], change[:r]
        if torch.equal(before.A, learned.A):
            terms, learned = terms[:-r], LowRank(before.B + learned.B, before.A)
        elif torch.equal(before.B, -learned.B):
            terms, learned = terms[:-r], LowRank(learned.B, learned.A - before.A)
        return (terms + learned + change[r:]).joined()

    def drawn(self) -> LowRank | None:
        """S B A as the factors were last drawn: the offset's last r terms take it out again.

        None where nothing is taken out: the factors were drawn at zero, or were not drawn yet.
        """
        terms, r = self.terms, self.r
        if self.config.directions == "zero" or terms.rank < r:
            return None
        start = terms[-r:]
        return LowRank(-start.B, start.A)

    def stayed(self) -> tuple[nn.Parameter, Tensor] | None:
        """The factor that is not trained, and its values, which the offset knows; None if not."""
        drawn = self.drawn()
        if drawn is None or not self.stays:
            return None
        a, b = self.factors
        if self.config.trained == "B":
            return a, drawn.A.to(a.device, a.dtype)
        return b, (drawn.B / self.scaling).to(b.device, b.dtype)

    def is_untouched(self) -> bool:
        """Whether the adapter is as it was made: not trained, not resampled, not loaded."""
        if self.draws == 0:  # it waits for a file
            return self.terms.rank == 0
        now = self.learned().to("cpu")
        if self.terms.rank == 0:  # drawn at zero
            return not now.B.any()
        return torch.equal(self.terms.A, now.A) and torch.equal(self.terms.B, -now.B)

    @torch.no_grad()
    def become(self, other: Adapter) -> None:
        """Be what another adapter of the same rank is: factors, offset and count of draws."""
        for factor, values in zip(self.factors, other.factors, strict=True):
            write(factor, whole(values))
        self.terms = LowRank(other.terms.B.clone(), other.terms.A.clone())
        self.draws = other.draws

    def state(self) -> tuple[list[Tensor], LowRank, int]:
        """What `restore` takes: a copy of the factors that are here, the offset, the draws."""
        here = [own_part(factor).detach().clone() for factor in self.factors]
        return here, self.terms, self.draws

    def restore(self, state: tuple[list[Tensor], LowRank, int]) -> None:
        """Be as one was."""
        before, self.terms, self.draws = state
        for factor, values in zip(self.factors, before, strict=True):
            own_part(factor).detach().copy_(values)

    def watch(self, like: Tensor) -> None:
        """Begin to sum up where the loss gradient lies, in backward passes, until the next draw.

        Args:
            like: a tensor of the precision and on the device to sum in.
        """
        self.sketch = Sketch(
            self.shape,
            self.r,
            # Not the draw's own, which goes on from its beginning.
            subspace.generator(self.config.seed, f"{self.layer}.{self.name}.watch", self.draws),
            like=like,
        )


def watched(
    result: Tensor,
    x: Tensor,
    adapters: list[Adapter],
    look: Callable[[Sketch, Tensor, Tensor], None] = Sketch.add,
) -> Tensor:
    """A layer's outputs of x, whose gradient reaches the sketches of these adapters by `look`."""
    for adapter in adapters:
        if adapter.sketch is not None:
            result = Watch.apply(result, x, partial(look, adapter.sketch))  # type: ignore[assignment]
    return result
