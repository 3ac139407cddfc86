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
from enum import IntEnum
from typing import Any, Protocol

import torch

from rosa.algebra.lowrank import LowRank
from rosa.errors import UserError
from rosa.layers import offset
from rosa.layers.adapter import Adapter
from rosa.pretrained.sharding import cut_as, is_dtensor, own_part, write
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
    counted: dict[str, int] | None

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


def count_writes(layer: Stateful) -> bool:
    """Note how often each parameter was written to by now; whether any is in shards.

    A loader of these writes into the parameters, and hands on all that there are.
    """
    weight = layer.base_weight.parameter
    named = {layer.weight_path: weight}
    for name, adapter in layer.adapters.items():
        for part, factor in zip(PARTS, adapter.factors, strict=False):
            named[part.format(name)] = factor
    layer.counted = {key: _count(tensor) for key, tensor in named.items()}
    return any(map(is_dtensor, named.values()))


def _count(tensor: torch.Tensor) -> int:
    return own_part(tensor)._version


def before_load(layer: Stateful, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before loading: take the offsets out of the weight, and note what arrives.

    Some loaders (torch.distributed.checkpoint's, which Accelerate calls) copy values into the
    parameters themselves and then hand on all of these: what is in memory already has come only
    if it was written to.
    """
    base, counted = layer.base_weight, layer.counted or {}
    layer.counted = None

    def handed(key: str, now: torch.Tensor) -> bool:
        """Whether the loader hands on a parameter that it had a look at."""
        return key in counted and state_dict.get(prefix + key) is now

    weight, parameter = state_dict.get(f"{prefix}{layer.weight_path}"), base.parameter
    in_place = weight is not None and _same_memory(weight, parameter)
    brings_weight = weight is not None and weight.shape == parameter.shape
    arrived = layer.arrived or Arrived()
    if handed(layer.weight_path, parameter):
        arrived.at_once = True
        written = _count(parameter) != counted[layer.weight_path]
        brings_weight = written if base.shard is None else base.shard.any(written)
    elif in_place:
        written = base.is_written() or _is_written_into(weight)
        brings_weight &= written if base.shard is None else base.shard.any(written)
    for name, adapter in layer.adapters.items():
        offset.drop_stand_ins(state_dict, prefix, name)
        factors = dict(zip(PARTS, adapter.factors, strict=False))
        for part, factor in factors.items():
            key = prefix + part.format(name)
            if key in state_dict and not is_dtensor(state_dict[key]):
                state_dict[key] = cut_as(state_dict[key], factor)
        its = {part: part.format(name) for part in PARTS}
        given = {part for part, factor in factors.items() if handed(its[part], factor)}
        if not given:
            _check_of_one_time(layer.name, adapter, state_dict, prefix)
        for part, key in its.items():
            value = state_dict.get(prefix + key)
            if value is None or (part in given and _count(factors[part]) == counted[key]):
                continue
            known = part in factors and part not in given and _same_memory(value, factors[part])
            into = arrived.perhaps if known and not _is_written_into(value) else arrived.parts
            into.setdefault(name, set()).add(part)
        if (
            given
            and not given & arrived.parts.get(name, set())
            and _has_now(adapter, state_dict, prefix)
        ):
            arrived.parts.pop(name, None)  # a saver leaves out what is frozen
        mark = state_dict.get(f"{prefix}rosa_offset.{name}.{offset.MARK}")
        if mark is not None and (base.shard is None or brings_weight or not in_place):
            arrived.marks[name] = Mark(int(mark))
    if brings_weight and not arrived.weight:
        arrived.before = base.fingerprint()
    arrived.weight |= brings_weight
    if arrived.weight or arrived.parts or arrived.marks:
        layer.bare(overwritten=brings_weight)
        layer.arrived = arrived
    if in_place:
        base.expect_write()


def is_in_parts(layer: Stateful) -> bool:
    """Whether its factors are in ZeRO 3's parts."""
    return any(is_in_part(f) for adapter in layer.adapters.values() for f in adapter.factors)


def _is_written_into(given: Any) -> bool:
    """Whether a state dict's alias of a parameter in shards, with its own count, was written to."""
    return is_dtensor(given) and _count(given) > 0


def _has_now(adapter: Adapter, state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether a state dict's offset is the one that an adapter has."""
    a, b, draws = (
        state_dict.get(f"{prefix}rosa_offset.{adapter.name}.{part}") for part in offset.PARTS
    )
    if a is None or b is None or draws is None or int(draws) != adapter.draws:
        return False
    mine = adapter.terms
    return torch.equal(a.to(mine.A), mine.A) and torch.equal(b.to(mine.B), mine.B)


def _check_of_one_time(
    layer: str, adapter: Adapter, state_dict: dict[str, Any], prefix: str
) -> None:
    """Raise UserError if the factors are the adapter's own and the offset is an earlier one."""
    draws: Any = state_dict.get(f"{prefix}rosa_offset.{adapter.name}.draws")
    values = [state_dict.get(prefix + part.format(adapter.name)) for part in PARTS[:2]]
    own = all(
        value is not None and _same_memory(value, factor)
        for value, factor in zip(values, adapter.factors, strict=True)
    )
    # It is a state dict as the model gave it: a loader has written into the count, or has its own.
    untouched = hasattr(draws, offset.BESIDE_LIVE_FACTORS) and draws._version == 0
    if own and untouched and int(draws) != adapter.draws:
        raise UserError(
            f"the state dict was taken before a draw, and its factors of layer {layer} are the "
            "model's own, which have been drawn anew since: with its offset they would be another "
            "model. Keep a copy, copy.deepcopy(model.state_dict()), or a saved file"
        )


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or one.shape != other.shape:
        return False
    return own_part(one).data_ptr() == own_part(other).data_ptr()


def after_load(layer: Stateful, _: Any) -> None:
    """A hook after loading: put the offsets back in, unless more is to come."""
    base = layer.base_weight
    if base.expects_write():
        base.arrived()
    arrived = layer.arrived
    if arrived is not None and (is_in_parts(layer) or arrived.is_whole(list(layer.adapters))):
        layer.synchronize()  # into parts, all has come at once
    base.refresh()  # here, where all processes come by


def take_all(layer: Stateful, arrived: Arrived, leaving: str | None = None) -> None:
    """Take what has arrived for all there is; raise UserError if an adapter has come in part.

    Args:
        layer: that is about to be used.
        arrived: to it.
        leaving: an adapter that is being deleted and need not be whole.
    """
    for adapter in layer.adapters:
        lacks = arrived.lacks(adapter) if adapter != leaving else set()
        if lacks and not _filled_in(layer.adapters[adapter], lacks):
            there = [part.format(adapter) for part in sorted(arrived.parts[adapter])]
            raise UserError(
                f"layer {layer.name} was given {', '.join(there)} and no more of adapter "
                f"{adapter!r}: factors and offset belong together, and with others the layer would "
                "compute something else. Load a state dict that has them all (model.state_dict(), "
                "or peft's get_peft_model_state_dict), also after the adapter was drawn again"
            )
    if not arrived.weight:
        return
    standing = dict(layer.base_weight.standing)
    for name, adapter in layer.adapters.items():
        if mark := arrived.marks.get(name, Mark.NOTHING):
            standing[name] = adapter.terms if mark is Mark.OFFSET else adapter.change()
            adapter.merged = mark is Mark.WHOLE
    if not arrived.marks:
        standing |= _unmarked(layer, arrived.before)
    layer.base_weight.standing = standing


def _filled_in(adapter: Adapter, lacks: set[str]) -> bool:
    """Give an adapter the factor that is not trained, if that is all that it lacks; whether so.

    DeepSpeed leaves what is frozen out of its checkpoints, where asked to, as Trainer does.
    """
    known = adapter.stayed()
    if known is None or lacks != {f"{name}.{{}}" for name in adapter.stays}:
        return False
    write(*known)
    return True


def _unmarked(layer: Stateful, before: tuple[float, float] | None) -> dict[str, LowRank]:
    """The offset in a weight that has come without a mark, as the second half of a state dict.

    Known where it is the pretrained weight that was there before, with an offset in it.
    """
    base = layer.base_weight
    if before is None or base.parameter.is_meta or base.holds({}, before):
        return {}
    changes = [{name: a.terms} for name, a in layer.adapters.items() if a.terms.rank]
    return next((each for each in changes if base.holds(each, before)), {})
