"""A layer is what it was where a change of it ends early: by an error, or by Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from peft.tuners.tuners_utils import onload_layer

from rosa.algebra.lowrank import LowRank
from rosa.layers.adapter import Adapter
from rosa.pretrained.weight import WRITING, BaseWeight
from rosa.pretrained.zero3 import is_in_part


class Asking(Protocol):
    """What is needed of a layer here; `RosaLayer` is one.

    Attributes:
        is_behind: whether something kept the weight from what is asked for, until the next use.
        arrived: what state dicts have brought, until then.
    """

    adapters: dict[str, Adapter]
    arrived: Any
    merged_adapters: list[str]
    is_behind: bool
    _disable_adapters: bool
    _active_adapter: Any
    _base_weight: BaseWeight

    @property
    def _takes_turns(self) -> bool: ...


@dataclass(frozen=True)
class Asked:
    """What a layer is asked for, and what is in force for that.

    Attributes:
        merged: names of adapters whose whole change is to stand in the weight.
        disabled: whether nothing is.
        active: the active adapters.
        whole: those whose whole change is in force.
        held: the changes that are in force.
        is_behind: whether these are others than what is asked for, as before a state dict is taken.
    """

    merged: list[str]
    disabled: bool
    active: str | list[str]
    whole: list[str]
    held: dict[str, LowRank]
    is_behind: bool


def asked_of(layer: Asking) -> Asked:
    """What a layer is asked for now."""
    return Asked(
        list(layer.merged_adapters),
        layer._disable_adapters,
        layer._active_adapter,
        [name for name, adapter in layer.adapters.items() if adapter.merged],
        dict(layer._base_weight.held),
        layer.is_behind or layer.arrived is not None,
    )


def ask_again(layer: Asking, asked: Asked) -> None:
    """Ask a layer for what it was asked for: now, or if it cannot be now, at its next use."""
    there = layer.adapters.keys()
    layer.merged_adapters[:] = [name for name in asked.merged if name in there]
    layer._disable_adapters = asked.disabled
    if ({asked.active} if isinstance(asked.active, str) else {*asked.active}) <= there:
        layer._active_adapter = asked.active
    for name, adapter in layer.adapters.items():
        adapter.merged = name in asked.whole
    layer.is_behind = True
    if is_in_part(layer._base_weight.parameter):  # all processes would have to
        return
    held = {name: change for name, change in asked.held.items() if name in there}
    module: Any = layer
    with contextlib.suppress(Exception), WRITING, onload_layer(module):  # the first error is told
        layer._base_weight.put(held, layer._takes_turns)
        layer.is_behind = asked.is_behind


@contextlib.contextmanager
def or_else(undo: Callable[[], object]) -> Iterator[None]:
    """Undo what was done where it ends early, by an error or by Ctrl-C."""
    try:
        yield
    except GeneratorExit:  # interrupted when all was done, and told at some later time
        raise
    except BaseException:
        undo()
        raise


def or_as_before(layer: Asking) -> AbstractContextManager[None]:
    """Take back what is asked for if the weight cannot be brought to it."""
    return or_else(partial(ask_again, layer, asked_of(layer)))
