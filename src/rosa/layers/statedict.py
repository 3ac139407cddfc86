"""What a state dict holds of an adapted layer.

That is the base weight, the factors, the offsets, and for each of these a mark that says whether it
is in that weight. What loading one does is in `rosa.layers.arriving`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch

from rosa.errors import UserError
from rosa.layers import offset
from rosa.layers.adapter import Adapter
from rosa.pretrained.sharding import is_dtensor
from rosa.pretrained.weight import BaseWeight
from rosa.pretrained.zero3 import is_in_part

PARTS = ("rosa_A.{}", "rosa_B.{}", *(f"rosa_offset.{{}}.{part}" for part in offset.PARTS))
"""The keys of an adapter in a layer's state dict, but for its name."""


class Mark(IntEnum):
    """What of an adapter is in the base weight beside it."""

    NOTHING = 0
    OFFSET = 1
    WHOLE = 2


class Stateful(Protocol):
    """What is needed of a layer here; `RosaLayer` is one."""

    name: str
    adapters: dict[str, Adapter]
    arrived: Arrived | None
    rosa_offset: offset.OffsetDict

    @property
    def weight_path(self) -> str:
        """Where the weight is, from the layer."""
        ...

    @property
    def base_weight(self) -> BaseWeight:
        """The weight and what stands in it."""
        ...

    def settle(self) -> None:
        """Take account of what arrived and of what others wrote."""

    def synchronize(self) -> None:
        """Bring the weight to what the layer's state asks for."""

    def bare(self, overwritten: bool = False) -> None:
        """Take everything out of the weight."""


@dataclass
class Arrived:
    """What state dicts have brought to a layer since it was last used."""

    at_once: bool = False  # and no more is to come
    weight: bool = False
    parts: dict[str, set[str]] = field(default_factory=dict)  # by adapter
    perhaps: dict[str, set[str]] = field(default_factory=dict)  # were there, maybe as they were
    marks: dict[str, Mark] = field(default_factory=dict)
    before: tuple[float, float] | None = None  # the fingerprint of what a weight took the place of

    def lacks(self, adapter: str) -> set[str]:
        """Which parts of an adapter have not come, where some have."""
        came, perhaps = self.parts.get(adapter, set()), self.perhaps.get(adapter, set())
        return set(PARTS) - came - perhaps if came else set()

    def is_whole(self, adapters: list[str]) -> bool:
        """Whether there is no sign that more is to come."""
        if self.at_once:
            return True
        whole = any(self.parts.values()) and not any(map(self.lacks, adapters))
        return whole and self.weight == bool(self.marks)  # what is saved whole has both


def after_save(layer: Stateful, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict hook: give the pretrained weight where that is known exactly, or asked for.

    The state dict of a module inside a PeftModel is how PEFT reads the base model's weights. That
    of the whole PeftModel keeps the weight in memory, without a copy, unless one is kept anyway.
    """
    marks = marks_of(layer)
    in_parts = is_in_part(layer.base_weight.parameter)  # which hold what is in memory, elsewhere
    if layer.arrived is None and not in_parts and _gives_pretrained(layer, prefix):
        give_pretrained(layer, state_dict, prefix)
        marks = dict.fromkeys(marks, Mark.NOTHING)
    for name, mark in marks.items():
        state_dict[f"{prefix}rosa_offset.{name}.{offset.MARK}"] = torch.tensor(int(mark))


def marks_of(layer: Stateful) -> dict[str, Mark]:
    """What of each adapter stands in the weight in memory."""
    marks = dict.fromkeys(layer.adapters, Mark.NOTHING)
    for name in layer.adapters.keys() & layer.base_weight.standing.keys():
        marks[name] = Mark.WHOLE if layer.adapters[name].merged else Mark.OFFSET
    return marks


def _gives_pretrained(layer: Stateful, prefix: str) -> bool:
    of_the_base = "base_model.model." not in prefix
    try:
        layer.settle()
    except UserError as error:
        if not of_the_base:
            raise
        # PEFT asks for it too when it is about to load other weights, and needs the names.
        key = f"{prefix}{layer.weight_path}"
        warnings.warn(f"{key} is as it lies in memory: {error}", stacklevel=2)
        return False
    return of_the_base or layer.base_weight.kept is not None


def give_pretrained(layer: Stateful, state_dict: dict[str, Any], prefix: str) -> None:
    """In a state dict, let W_0 stand where the weight in memory holds more.

    Args:
        layer: whose weight it is.
        state_dict: the model's, or what is being saved of it; may lack the base weight.
        prefix: the layer's name in it, with a dot.
    """
    key, base = f"{prefix}{layer.weight_path}", layer.base_weight
    if key not in state_dict or not base.standing:
        return
    if is_in_part(base.parameter):
        if state_dict[key].numel():  # else nobody has asked for it
            state_dict[key] = base.pretrained_of(state_dict[key])
    elif base.shard is None or is_dtensor(state_dict[key]):
        state_dict[key] = base.pretrained_as_stored()
    elif any(state_dict.get(f"{prefix}rosa_offset.{n}.{offset.MARK}", 1) for n in base.standing):
        state_dict[key] = base.pretrained_of(state_dict[key])  # gathered, as FSDP's savers do


def is_in_parts(layer: Stateful) -> bool:
    """Whether its factors are in ZeRO 3's parts."""
    return any(is_in_part(f) for adapter in layer.adapters.values() for f in adapter.factors)
