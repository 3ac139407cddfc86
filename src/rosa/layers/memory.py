"""Whose memory a weight lies in: ROSA changes weights in memory, and only its own model's."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rosa.errors import UserError
from rosa.layers.sharding import is_sharded


def weight_owners(model: nn.Module) -> dict[tuple[int, int], list[str]]:
    """The names of each weight, by where it lies in memory."""
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):  # it has no memory, nor an end to it
            continue
        owners[place(parameter)].append(name)
    return owners


def place(weight: Tensor) -> tuple[int, int]:
    """Where a weight lies in memory; one that has no memory yet is told by its identity."""
    pointer = _block(weight)
    return (pointer, int(weight.storage_offset())) if pointer else (-1, id(weight))


def tenants(model: nn.Module) -> Counter[int]:
    """How many parameters and buffers of a model lie in each block of memory."""
    there = {id(t): t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)}
    return Counter(map(_block, there.values()))


def make_private(base: nn.Module, name: str, tenants: Counter[int]) -> None:
    """Give a layer a weight of its own if anyone outside its model holds it or its memory.

    Another model made from the same weights, a state dict that someone keeps: they would see each
    change of the weight, and are left what they have.

    Args:
        base: a layer.
        name: of its weight.
        tenants: of its model; see `tenants`.
    """
    weight: nn.Parameter = getattr(base, name)
    if not _block(weight):
        return
    usual = _holders(nn.Linear(1, 1), "weight")
    del weight  # the names here count too
    objects, users = _holders(base, name)
    weight = getattr(base, name)
    if objects <= usual[0] and users - usual[1] < max(tenants[_block(weight)], 1):
        return
    own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    vars(own).update(vars(weight))
    # Not by setattr: under accelerate's init_empty_weights, in which PEFT loads adapters, that puts
    # every new parameter on the meta device, and the weight would be lost.
    base._parameters[name] = own


def _holders(layer: nn.Module, name: str) -> tuple[int, int]:
    """How many references there are to a weight, and how many tensors to its memory."""
    weight = layer._parameters[name]
    assert weight is not None
    storage = weight.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
    return sys.getrefcount(weight), users


def _block(weight: Tensor) -> int:
    """The address of the block of memory that a tensor lies in; 0 if it has none."""
    # A tensor that is made of others, as torchao's quantized ones, has no memory of its own.
    elsewhere = weight.is_meta or is_sharded(weight) or is_traceable_wrapper_subclass(weight)
    return 0 if elsewhere else weight.untyped_storage().data_ptr()


def check_in_memory(name: str, base: nn.Module, weight: Tensor) -> None:
    """Raise ValueError if accelerate has offloaded the weight of a base layer."""
    if weight.is_meta and hasattr(base, "_hf_hook"):
        raise UserError(
            f"the weight of {name} is offloaded by accelerate: ROSA changes weights in memory, so "
            "load the model without offloading (device_map)"
        )
