"""Tensors and models that are spread over processes, so that no process holds them whole.

torch's `fully_shard` (FSDP2) cuts each parameter along its first dimension and makes it whole for
the passes alone. Tensor parallelism cuts a linear layer's along the first or the second, and
computes with the shards. ROSA changes the shards. DeepSpeed's ZeRO 3 cuts a parameter's flattened
numbers (`rosa.pretrained.zero3`). What else spreads weights is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rosa.errors import UserError
from rosa.pretrained import zero3


def are_several() -> bool:
    """Whether this process is one of a group of several."""
    return _is_in_a_group() and torch.distributed.get_world_size() > 1


def _is_in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_kept(weight: Tensor, moved: Tensor) -> None:
    """Raise UserError if one of several processes gives its weights away, to the meta device."""
    if moved.is_meta and not weight.is_meta and are_several():
        raise UserError(
            "the model's weights are taken away to be sent anew (FSDP's "
            "cpu_ram_efficient_loading), which ROSA's offsets, that are no parameters, do not live "
            "through: set fsdp_cpu_ram_efficient_loading to false"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor, whatever its shape says.

    `numel` tells nothing: a DTensor (FSDP2, tensor parallelism) has the shape of the whole one,
    and so may a parameter of DeepSpeed's ZeRO-3, which is whole for a moment only.
    """
    if zero3.is_in_part(tensor):
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


def cut_dim(tensor: Tensor) -> int | None:
    """The one dimension that a tensor is cut along; None if it is whole, or cut in other ways."""
    if not is_dtensor(tensor):
        return None
    from torch.distributed.tensor import Shard

    cuts = [p for p in tensor.placements if not p.is_replicate()]  # type: ignore[attr-defined]
    return cuts[0].dim if len(cuts) == 1 and type(cuts[0]) is Shard else None


def is_cut(weight: Tensor) -> bool:
    """Whether tensor parallelism has cut a matrix by its rows or by its columns, and nothing else.

    Not beside other ways to spread it, as in a mesh of several dimensions.
    """
    return cut_dim(weight) is not None and weight.device_mesh.ndim == 1  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, its shard, or its part of ZeRO 3's."""
    if zero3.is_in_part(tensor):
        return tensor.ds_tensor  # type: ignore[attr-defined]
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of one in parts all processes must ask for it."""
    if zero3.is_in_part(tensor):
        with zero3.at_hand([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def cut_as(values: Tensor, like: Tensor) -> Tensor:
    """Values that every process holds, spread as another tensor is; as they are if it is not."""
    if not is_dtensor(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    how: Any = like
    return distribute_tensor(values, how.device_mesh, how.placements, src_data_rank=None)


def from_first(values: Tensor, like: Tensor) -> Tensor:
    """What the first of the processes that a tensor is spread over holds of some values."""
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    values = values.contiguous()
    torch.distributed.broadcast(values, group=mesh.get_group(), group_src=0)
    return values


@torch.no_grad()
def write(parameter: Tensor, values: Tensor) -> None:
    """Let a parameter be values that every process holds, spread as it is."""
    if zero3.is_in_part(parameter):
        zero3.write(parameter, values)
    else:
        parameter.copy_(cut_as(values, parameter))


def check_unsharded(model: nn.Module, instead: str) -> None:
    """Raise ValueError for a model in FSDP (1 or 2), ZeRO 3 or tensor parallelism.

    Args:
        model: the model.
        instead: what to do about it.
    """
    if any(map(zero3.is_in_part, model.parameters())):
        raise UserError(f"the model is in parts over processes (ZeRO 3): {instead}")
    for name, _ in _fully_sharded(model):
        raise UserError(f"{name or 'the model'} is sharded over processes (FSDP): {instead}")
    check_shards(model)
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise UserError(f"{name} is cut over processes (tensor parallelism): {instead}")


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
    return bool(_fully_sharded(model)) or any(True for _ in _around(model))


def _fully_sharded(model: nn.Module) -> list[tuple[str, Any]]:
    if not _is_in_a_group():  # which each switch of adapters asks first
        return []
    from torch.distributed.fsdp import FSDPModule

    return [(name, m) for name, m in model.named_modules() if isinstance(m, FSDPModule)]


def _around(module: nn.Module) -> Iterator[Any]:
    """The modules that `fully_shard` was called on and that this one is in, as torch knows them."""
    if not _is_in_a_group():
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for each in list(_module_state_mapping):
        if isinstance(each, FSDPModule) and any(one is module for one in each.modules()):
            yield each


def reshard(model: nn.Module) -> None:
    """Let each process hold its rows alone, as between the passes.

    After a forward pass without a backward one, the outermost weights are still whole, and what is
    written into them then is lost.
    """
    for module in (*_around(model), *(m for _, m in _fully_sharded(model))):
        module.reshard()
