"""Who holds a module or a weight: references are counted, as CPython keeps them."""

from __future__ import annotations

import gc
import sys
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_LOOKED_INTO = (MethodType, partial, FunctionType, CellType, tuple, list, dict)
"""What a module may hold that holds the module: a forward that was put on it, its hooks."""


def references(modules: dict[str, Any], name: str) -> int:
    """How many there are to a module of that name."""
    return sys.getrefcount(modules[name])


def references_to_itself(module: Any) -> int:
    """How many references to a module are in what it holds itself."""
    found, seen = 0, set[int]()
    waiting: list[Any] = list(vars(module).values())
    while waiting:
        holder = waiting.pop()
        if not isinstance(holder, _LOOKED_INTO) or id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, FunctionType):  # not the names of its file
            held = [*(holder.__closure__ or ()), holder.__defaults__, vars(holder)]
        else:
            held = gc.get_referents(holder)
        found += sum(each is module for each in held)
        waiting += held
    return found


def references_to_weight(layer: nn.Module, name: str) -> tuple[int, int]:
    """How many there are to a weight, and how many tensors to its memory."""
    weight = layer._parameters[name]
    assert weight is not None
    storage = weight.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
    return sys.getrefcount(weight), users
