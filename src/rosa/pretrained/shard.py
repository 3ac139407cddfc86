"""A weight's memory in this process: all of it, or the shard that is here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rosa.algebra.lowrank import LowRank
from rosa.errors import UserError
from rosa.pretrained import zero3
from rosa.pretrained.sharding import (
    cut_as,
    cut_dim,
    is_dtensor,
    is_fully_sharded,
    own_part,
    whole,
)
from rosa.pretrained.versions import State, Versions
from rosa.pretrained.views import MatrixView


@dataclass(frozen=True)
class Shard:
    """The shard of a parameter that this process holds: some rows of it, or some columns.

    Attributes:
        of: the parameter in shards.
        dim: along which it is cut, 0 or 1.
    """

    of: Tensor
    dim: int

    @cached_property
    def here(self) -> slice:
        """The rows, or the columns."""
        size, how = self.of.shape[self.dim], own_part(self.of)
        every = torch.arange(size, device=how.device).view(*(1,) * self.dim, size)
        mine = own_part(cut_as(every, self.of))[(0,) * self.dim]
        return slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)

    def change(self, change: LowRank, transposed: bool) -> LowRank:
        """What of a change of the weight as ([n,] out, in) is in this shard.

        Args:
            change: of the whole weight.
            transposed: whether the parameter is stored as ([n,] in, out).
        """
        b, a = change.B, change.A
        if b.dim() > 2:  # a stack: some of the matrices
            return LowRank(b[self.here], a[self.here])
        of_inputs = transposed == (self.dim == 0)
        return LowRank(b, a[:, self.here]) if of_inputs else LowRank(b[self.here], a)

    def part_of(self, stored: Tensor) -> Tensor:
        """Of a whole tensor of the parameter's shape, what is in this shard."""
        return stored[self.here] if self.dim == 0 else stored[:, self.here]

    def any(self, here: bool) -> bool:
        """Whether something is so in any process; all must ask for it."""
        how: Any = self.of
        found = torch.tensor(float(here), device=own_part(self.of).device)
        for dim in range(how.device_mesh.ndim):
            torch.distributed.all_reduce(found, group=how.device_mesh.get_group(dim))
        return bool(found)

    def spread(self, here: Tensor) -> Tensor:
        """What is in this shard, in the shape it is stored in, as a tensor like the parameter."""
        from torch.distributed.tensor import DTensor

        how: Any = self.of
        return DTensor.from_local(
            here.contiguous(),
            how.device_mesh,
            how.placements,
            run_check=False,
            shape=how.shape,
            stride=how.stride(),
        )


class WeightMemory:
    """Where a weight lies, and which shard of it.

    Args:
        name: the layer's, for messages.
        view: the weight as a matrix ([n,] out, in).
    """

    def __init__(self, name: str, view: MatrixView) -> None:
        self.name = name
        self.view = view
        self._versions = Versions()
        self._shard: Shard | None = None
        self._is_spread = False  # over processes, whenever it is not whole
        self._changes = 0  # of all shards together, that torch had counted when it was last noted

    @property
    def parameter(self) -> Tensor:
        """The parameter that the weight in memory is."""
        return self.view.parameter

    @property
    def matrix(self) -> Tensor:
        """The weight in memory as (out, in): a view, without gradient history."""
        if self.shard is None and not is_dtensor(self.parameter):
            return self.view.matrix
        return self.view.as_matrix(self.memory.detach())

    @property
    def memory(self) -> Tensor:
        """The parameter, or the shard of it that is here.

        Raises:
            UserError: it is whole for the passes alone: what is written into it then is lost.
        """
        if self.is_lent:
            raise UserError(
                f"the weight of {self.name} is whole for a forward or backward pass (FSDP) and "
                "cannot be changed now: wait for the end of the step, or call reshard() of the "
                "outermost module that fully_shard was called on"
            )
        if self.shard is None and is_dtensor(self.parameter):
            raise UserError(
                f"the weight of {self.name} is sharded over processes in a way that ROSA does not "
                "know (fully_shard's shard_placement_fn, or several ways at once): leave that out"
            )
        return self.parameter if self.shard is None else own_part(self.parameter)

    @property
    def shard(self) -> Shard | None:
        """Which shard of the weight is here; None for all of it."""
        parameter = self.parameter
        if self._shard is None or self._shard.of is not parameter:
            dim = cut_dim(parameter)
            if dim == 0 or (dim == 1 and parameter.dim() == 2):
                first = self._shard is None
                self._shard, self._is_spread = Shard(parameter, dim), True
                if first:
                    self.cut()
            elif is_dtensor(parameter):
                return None  # it was spread in yet another way
        return self._shard

    @property
    def is_lent(self) -> bool:
        """Whether a weight in shards is whole just now, for a pass of the model."""
        if is_dtensor(self.parameter):
            return False
        if not self._is_spread and self._versions.replaced(self.parameter):
            self._is_spread = is_fully_sharded(self.view.module)  # since it was last looked at
        return self._is_spread

    def _note(self, state: State, moved: bool = False) -> None:
        """Take note that the weight is now of a state; what others write is told from that on."""
        note = self._versions.copied if moved else self._versions.arrived
        note(self.memory, state)
        self._changes = 0 if self.shard is None else self.parameter._version

    def _is_written(self) -> bool:
        """Whether others have written into it: into this shard, or into all as one tensor."""
        if self._versions.written(self.memory):
            return True
        known = self.shard is not None and not self._versions.replaced(self.memory)
        return known and self.parameter._version != self._changes

    def at_hand(self, written: bool = False) -> AbstractContextManager[None]:
        """While a weight in ZeRO 3's parts is whole; see `zero3.at_hand`."""
        return zero3.at_hand([self.parameter], written)

    def here(self, change: LowRank) -> LowRank:
        """What of a change is in the memory."""
        return change if self.shard is None else self.shard.change(change, self.view.transposed)

    def part_of(self, matrix: Tensor) -> Tensor:
        """What of a whole matrix (out, in) is in the memory."""
        if self.shard is None:
            return matrix
        return self.view.as_matrix(self.shard.part_of(self.view.as_stored(matrix)))

    def gathered(self, matrix: Tensor) -> Tensor:
        """All of a matrix (out, in) that is held as the weight is."""
        if self.shard is None:
            return matrix
        return self.view.as_matrix(whole(self.shard.spread(self.view.as_stored(matrix))))

    def cut(self) -> None:
        """Take note that the memory is a shard from now on."""
