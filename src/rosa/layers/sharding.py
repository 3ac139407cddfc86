"""Tensors and models that are spread over processes, so that no process holds them whole.

torch's `fully_shard` (FSDP2) cuts each parameter along its first dimension and makes it whole for
the passes alone: between them a process holds its rows, and ROSA changes those. What else spreads
weights is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank
from rosa.errors import UserError


def are_several() -> bool:
    """Whether this process is one of a group of several."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor, whatever its shape says.

    `numel` tells nothing: a DTensor (FSDP2, tensor parallelism) has the shape of the whole one,
    and so may a parameter of DeepSpeed's ZeRO-3, which is whole for a moment only.
    """
    if hasattr(tensor, "ds_tensor"):  # ZeRO-3's own part
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor

    return is_dtensor(tensor) or isinstance(tensor, ShardedTensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is one of torch's distributed tensors."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_in_rows(tensor: Tensor) -> bool:
    """Whether each process holds some rows of it, as `fully_shard` leaves a parameter."""
    if not is_dtensor(tensor):
        return False
    from torch.distributed.tensor import Replicate, Shard

    placements = list(tensor.placements)  # type: ignore[attr-defined]
    return placements.count(Shard(0)) == 1 and placements.count(Replicate()) == len(placements) - 1


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its rows."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of one in parts all processes must ask for it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def cut_as(values: Tensor, like: Tensor) -> Tensor:
    """Values that every process holds, spread as another tensor is; as they are if it is not."""
    if not is_dtensor(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    how: Any = like
    return distribute_tensor(values, how.device_mesh, how.placements, src_data_rank=None)


@dataclass(frozen=True)
class Rows:
    """Which rows of a parameter this process holds.

    Attributes:
        of: the parameter in parts.
    """

    of: Tensor

    @cached_property
    def here(self) -> slice:
        """The rows."""
        every = torch.arange(self.of.shape[0], device=own_part(self.of).device)
        mine = own_part(cut_as(every, self.of))
        return slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)

    def change(self, change: LowRank, transposed: bool) -> LowRank:
        """What of a change of the weight as ([n,] out, in) is in these rows.

        Args:
            change: of the whole weight.
            transposed: whether the parameter is stored as ([n,] in, out).
        """
        b, a = change.B, change.A
        if b.dim() > 2:  # a stack: some of the matrices
            return LowRank(b[self.here], a[self.here])
        return LowRank(b, a[:, self.here]) if transposed else LowRank(b[self.here], a)

    def spread(self, rows: Tensor) -> Tensor:
        """These rows, in the shape they are stored in, as a tensor like the parameter."""
        from torch.distributed.tensor import DTensor

        how: Any = self.of
        return DTensor.from_local(
            rows.contiguous(),
            how.device_mesh,
            how.placements,
            run_check=False,
            shape=how.shape,
            stride=how.stride(),
        )


def check_unsharded(model: nn.Module, instead: str) -> None:
    """Raise ValueError for a model in FSDP (1 or 2), which keeps parts of the weights.

    Args:
        model: the model.
        instead: what to do about it.
    """
    for name, _ in _fully_sharded(model):
        raise UserError(f"{name or 'the model'} is sharded over processes (FSDP): {instead}")
    check_shards(model)


def check_shards(model: nn.Module) -> None:
    """Raise ValueError for a model in FSDP 1, whose parts of weights are rows of nothing."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    for name, module in model.named_modules():
        if (
            isinstance(module, FullyShardedDataParallel)
            and module.sharding_strategy != ShardingStrategy.NO_SHARD
        ):
            raise UserError(
                f"{name or 'the model'} is sharded over processes by FSDP 1, which keeps no rows "
                "of a weight together: use FSDP 2 (torch's fully_shard, Accelerate's "
                "fsdp_version=2), or train data-parallel without sharding"
            )


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on the model, a part of it, or what it is a part of."""
    return bool(_fully_sharded(model) or _around(model))


def _fully_sharded(model: nn.Module) -> list[tuple[str, Any]]:
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [(name, m) for name, m in model.named_modules() if isinstance(m, FSDPModule)]


def _around(module: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on and that this one is in, as torch knows them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    known = [each for each in list(_module_state_mapping) if isinstance(each, FSDPModule)]
    return [each for each in known if any(one is module for one in each.modules())]  # type: ignore


def reshard(model: nn.Module) -> None:
    """Let each process hold its rows alone, as between the passes.

    After a forward pass without a backward one, the outermost weights are still whole, and what is
    written into them then is lost.
    """
    for module in (*_around(model), *(m for _, m in _fully_sharded(model))):
        module.reshard()
