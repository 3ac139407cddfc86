"""Factors that every process holds whole, beside a weight of which each has some rows (FSDP 2).

An adapter that is attached after the model was cut (transformers' `DistributedConfig(fsdp_size=n)`
cuts it as it is loaded) is unknown to FSDP, which takes the mean over the processes of the
gradients of what it has cut alone. Here that mean is taken as each gradient is there. Transformers'
Trainer takes it too, of parameters without its mark; the mean of a mean is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rosa.pretrained.sharding import is_dtensor

_MARK = "_replicated_grad_hook_registered"
"""The attribute by which transformers' Trainer knows that it has seen to a parameter's gradient."""


def average_gradients(factors: Iterable[nn.Parameter], weight: Tensor) -> None:
    """Let the gradients of factors be the mean over the processes that a weight is cut over.

    Args:
        factors: whole in each of these processes; those that FSDP has cut are left to it.
        weight: a distributed tensor.
    """
    group = weight.device_mesh.get_group()  # type: ignore[attr-defined]

    def average(factor: Tensor) -> None:
        gradient: Any = factor.grad
        torch.distributed.all_reduce(gradient, group=group)
        gradient.div_(torch.distributed.get_world_size(group))

    for factor in factors:
        if factor.requires_grad and not hasattr(factor, _MARK) and not is_dtensor(factor):
            factor.register_post_accumulate_grad_hook(average)
            setattr(factor, _MARK, True)
