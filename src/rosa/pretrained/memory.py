"""Whose memory a weight lies in: ROSA changes weights in memory, and only its own model's."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rosa.errors import UserError
from rosa.pretrained.holders import references_to_weight
from rosa.pretrained.sharding import is_sharded

Owners = dict[int, list[tuple[str, Tensor]]]
"""The parameters and buffers of a model with their names, by the block of memory they lie in."""


def weight_owners(model: nn.Module) -> Owners:
    """Those of a model, with all of their names; one that has no memory yet is alone."""
    owners: Owners = defaultdict(list)
    named = model.named_parameters, model.named_buffers
    for name, tensor in chain.from_iterable(each(remove_duplicate=False) for each in named):
        if not is_lazy(tensor):  # it has no memory, nor an end to it
            owners[_block(tensor) or -id(tensor)].append((name, tensor))
    return owners


def owners_of(weight: Tensor, owners: Owners) -> list[str]:
    """The names of all that shares memory with a weight: its own, and what is tied to it."""
    there = owners.get(_block(weight) or -id(weight), ())
    return [name for name, tensor in there if tensor is weight or _overlap(tensor, weight)]


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in one block of memory have numbers in common."""
    (begin, end), (first, last) = _extent(one), _extent(other)
    if end <= first or last <= begin:
        return False
    apart = one.element_size() != other.element_size()
    if apart or any(_is_dense(each) for each in (one, other)):
        return True
    low, size = min(begin, first), one.element_size()  # such as columns beside each other
    taken = torch.zeros((max(end, last) - low) // size, dtype=torch.bool)
    views = [
        taken.as_strided(each.shape, each.stride(), (start - low) // size)
        for each, start in ((one, begin), (other, first))
    ]
    views[0].fill_(True)
    return bool(views[1].any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its block, and the one after its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    numbers = 1 + sum((size - 1) * stride for size, stride in steps)
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return start * size, (start + (numbers if tensor.numel() else 0)) * size


def _is_dense(tensor: Tensor) -> bool:
    begin, end = _extent(tensor)
    return end - begin == tensor.numel() * tensor.element_size()


def tenants(model: nn.Module) -> Counter[int]:
    """How many parameters and buffers of a model lie in each block of memory."""
    there = {id(t): t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)}
    return Counter(map(_block, there.values()))


def make_private(base: nn.Module, name: str, tenants: Counter[int]) -> None:
    """Give a layer a weight of its own if anyone outside its model holds it or its memory.

    Another model made from the same weights, a state dict that someone keeps, another process that
    shares the memory: they would see each change of the weight, and are left what they have.

    Args:
        base: a layer.
        name: of its weight.
        tenants: of its model; see `tenants`.
    """
    weight: nn.Parameter = getattr(base, name)
    if not _block(weight):
        return
    usual = references_to_weight(nn.Linear(1, 1), "weight")
    del weight  # the names here count too
    objects, users = references_to_weight(base, name)
    weight = getattr(base, name)
    alone = objects <= usual[0] and users - usual[1] < max(tenants[_block(weight)], 1)
    if alone and not (weight.device.type == "cpu" and weight.is_shared()):
        return
    own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    vars(own).update(vars(weight))
    # Not by setattr: under accelerate's init_empty_weights, in which PEFT loads adapters, that puts
    # every new parameter on the meta device, and the weight would be lost.
    base._parameters[name] = own


def _block(weight: Tensor) -> int:
    """The address of the block of memory that a tensor lies in; 0 if it has none."""
    # What is made of others, as sparse tensors and torchao's are, has no memory of its own.
    made = is_traceable_wrapper_subclass(weight) or weight.layout is not torch.strided
    elsewhere = weight.is_meta or is_sharded(weight) or made
    return 0 if elsewhere else weight.untyped_storage().data_ptr()


def check_in_memory(name: str, base: nn.Module, weight: Tensor) -> None:
    """Raise ValueError if accelerate has offloaded the weight of a base layer."""
    if weight.is_meta and hasattr(base, "_hf_hook"):
        raise UserError(
            f"the weight of {name} is offloaded by accelerate: ROSA changes weights in memory, so "
            "load the model without offloading (device_map)"
        )
