"""What a state dict holds of an adapted layer, and what loading one makes of its weight.

A state dict holds the base weight, the factors, the offsets, and for each of these a mark that says
whether it is in that weight. They may lie in one file or in many and be loaded in any order: while
they arrive nothing stands in the weight in memory, as far as the layer knows. What the marks say,
and what the layer's state asks for, counts once a state dict has brought whole adapters, or else
before the layer is used again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from rosa.errors import UserError

if TYPE_CHECKING:
    from rosa.layers.base import RosaLayer
    from rosa.layers.linear import RosaLinear

_PARTS = ("rosa_A.{}", "rosa_B.{}", "rosa_offset.{}.A", "rosa_offset.{}.B", "rosa_offset.{}.draws")


@dataclass
class Arrived:
    """What state dicts have brought to a layer since it was last used."""

    weight: bool = False
    parts: dict[str, set[str]] = field(default_factory=dict)  # by adapter
    perhaps: dict[str, set[str]] = field(default_factory=dict)  # were there, maybe as they were
    marks: dict[str, int] = field(default_factory=dict)  # 1: the offset is in it, 2: s B A too

    def lacks(self, adapter: str) -> bool:
        """Whether a part of an adapter has come and another one has not."""
        came, perhaps = self.parts.get(adapter, set()), self.perhaps.get(adapter, set())
        return bool(came) and len(came | perhaps) < len(_PARTS)

    def is_whole(self, adapters: list[str]) -> bool:
        """Whether there is no sign that more is to come."""
        whole = any(self.parts.values()) and not any(map(self.lacks, adapters))
        return whole and self.weight == bool(self.marks)  # what is saved whole has both


def after_save(layer: RosaLinear, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict hook: give the pretrained weight where that is known exactly, or asked for.

    The state dict of a module inside a PeftModel is how PEFT reads the base model's weights. That
    of the whole PeftModel keeps the weight in memory, without a copy, unless one is kept anyway.
    """
    if layer.arrived is not None:
        return  # nothing stands in the weight
    of_the_base = "base_model.model." not in prefix
    try:
        layer.settle()
    except UserError as error:
        if not of_the_base:
            raise
        # PEFT asks for it too when it is about to load other weights, and needs the names.
        warnings.warn(f"{prefix}base_layer.weight is as it lies in memory: {error}", stacklevel=2)
        return
    if of_the_base or layer.keeps_a_copy:
        layer.give_pretrained_weight(state_dict, prefix)
        for adapter in layer.rosa_offset:
            state_dict[f"{prefix}rosa_offset.{adapter}.in_weight"] = torch.tensor(0)


def before_load(layer: RosaLinear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before loading: take the offsets out of the weight, and note what arrives.

    Some loaders (torch.distributed.checkpoint's, which Accelerate calls) copy values into the
    parameters themselves and then hand on all of these: what is in memory already has come only
    if it was written to.
    """
    weight, parameter = state_dict.get(f"{prefix}base_layer.weight"), layer.parameter
    in_place = weight is not None and _same_memory(weight, parameter)
    brings_weight = weight is not None and weight.shape == parameter.shape
    brings_weight &= not in_place or layer.is_written()
    arrived = layer.arrived or Arrived()
    for adapter in layer.rosa_offset:
        factors = {"rosa_A.{}": layer.rosa_A[adapter], "rosa_B.{}": layer.rosa_B[adapter]}
        for part in _PARTS:
            value = state_dict.get(prefix + part.format(adapter))
            if value is not None:
                known = part in factors and _same_memory(value, factors[part])
                into = arrived.perhaps if known else arrived.parts
                into.setdefault(adapter, set()).add(part)
        mark = state_dict.get(f"{prefix}rosa_offset.{adapter}.in_weight")
        if mark is not None:
            arrived.marks[adapter] = int(mark)
    arrived.weight |= brings_weight
    if arrived.weight or arrived.parts or arrived.marks:
        layer.bare(overwritten=brings_weight)
        layer.arrived = arrived
    if in_place:
        layer.expect_write()


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not one.is_meta and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def after_load(layer: RosaLinear, _: Any) -> None:
    """A hook after loading: put the offsets back in, unless more is to come."""
    layer.expected_write()
    if layer.arrived is not None and layer.arrived.is_whole(list(layer.rosa_offset)):
        layer.synchronize()


def take_all(layer: RosaLayer, arrived: Arrived, leaving: str | None = None) -> None:
    """Take what has arrived for all there is; raise UserError if an adapter has come in part.

    Args:
        layer: that is about to be used.
        arrived: to it.
        leaving: an adapter that is being deleted and need not be whole.
    """
    for adapter in layer.rosa_offset:
        if arrived.lacks(adapter) and adapter != leaving:
            there = [part.format(adapter) for part in sorted(arrived.parts[adapter])]
            raise UserError(
                f"layer {layer.name} was given {', '.join(there)} and no more of adapter "
                f"{adapter!r}: factors and offset belong together, and with others the layer would "
                "compute something else. Load a state dict that has them all (model.state_dict(), "
                "or peft's get_peft_model_state_dict), also after the adapter was drawn again"
            )
    if arrived.weight:
        for adapter, entry in layer.rosa_offset.entries.items():
            mark = arrived.marks.get(adapter, 0)
            if mark:
                entry.in_weight = entry.terms if mark == 1 else layer.change_of(adapter)
                entry.merged = mark == 2
