"""A parameter in DeepSpeed's ZeRO 3, of whose flattened numbers each process holds a part.

Between the passes its memory is empty. It is made whole for a pass, and thrown away after it; what
is to last is written into the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rosa.errors import UserError


def is_in_part(tensor: Any) -> bool:
    """Whether it is such a parameter, whole just now or not."""
    return hasattr(tensor, "ds_tensor")


def check_part(parameter: Any) -> None:
    """Raise UserError where the parts are not all that there is, or not in this process's memory.

    Args:
        parameter: that `is_in_part`.
    """
    part = parameter.ds_tensor
    if parameter.ds_secondary_tensor is not None:
        option = "zero_hpz_partition_size"
    elif hasattr(part, "ds_quant_scale"):
        option = "zero_quantized_nontrainable_weights"
    elif getattr(part.final_location, "value", None) == "nvme":
        option = "offload_param to nvme"
    else:
        return
    raise UserError(
        "ZeRO 3 holds the model's weights in a way that ROSA cannot write into: leave "
        f"{option} out of DeepSpeed's config"
    )


def shape_of(tensor: Any) -> torch.Size:
    """Of the whole tensor."""
    return tensor.ds_shape if is_in_part(tensor) else tensor.shape


def part_of(parameter: Any, values: Tensor) -> Tensor:
    """What this process holds of values that are spread as a parameter is, flattened."""
    size, n = parameter.ds_tensor.numel(), parameter.ds_numel
    start = min(n, size * torch.distributed.get_rank(parameter.ds_process_group))
    return values.detach().flatten()[start : min(n, start + size)]


@torch.no_grad()
def write(parameter: Any, values: Tensor) -> None:
    """Let a parameter be values that all processes have; each keeps its part."""
    part = part_of(parameter, values)
    parameter.ds_tensor[: len(part)].copy_(part)
    if _is_whole(parameter) and parameter.data_ptr() != values.data_ptr():
        parameter.detach().copy_(values)


@contextmanager
def at_hand(parameters: Iterable[Any], written: bool = False) -> Iterator[None]:
    """While parameters are whole in every process; those that are not in parts are as they are.

    Args:
        parameters: all processes must ask for the same ones.
        written: whether what is written into them lasts.

    Raises:
        UserError: one is to be written to, and a pass of the model uses it, or see `check_part`.
    """
    found = [parameter for parameter in parameters if is_in_part(parameter)]
    for parameter in found if written else ():
        check_part(parameter)
    if written and any(parameter.ds_active_sub_modules for parameter in found):
        raise UserError(
            "a weight is in use by a forward or backward pass (ZeRO 3) and cannot be changed now: "
            "wait for the end of the step"
        )
    with _gathered([parameter for parameter in found if not _is_whole(parameter)]):
        yield
        for parameter in found if written else ():
            write(parameter, parameter)


def _gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


def _is_whole(parameter: Any) -> bool:
    return parameter.numel() == parameter.ds_numel
