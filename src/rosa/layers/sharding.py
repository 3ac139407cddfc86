"""Whether a tensor, or a model, is spread over processes, so that no process holds it whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rosa.errors import UserError


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
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, (DTensor, ShardedTensor))


def check_unsharded(model: nn.Module) -> None:
    """Raise ValueError for a model in FSDP (1 or 2), which keeps parts of the weights.

    Its weights are whole after a forward pass without a backward one; what is written into them
    then is lost.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy

    for name, module in model.named_modules():
        sharded = isinstance(module, FSDPModule) or (
            isinstance(module, FullyShardedDataParallel)
            and module.sharding_strategy != ShardingStrategy.NO_SHARD
        )
        if sharded:
            raise UserError(
                f"{name or 'the model'} is sharded over processes (FSDP): ROSA changes whole "
                "weights, so train data-parallel without sharding (DistributedDataParallel, or "
                "Accelerate without an FSDP plugin)"
            )
