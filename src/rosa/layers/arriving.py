"""What loading a state dict makes of an adapted layer's weight.

The parts of an adapter and the weight may lie in one file or in many and be loaded in any order:
while they arrive nothing stands in the weight in memory, as far as the layer knows. What the marks
say, and what the layer's state asks for, counts once a state dict has brought whole adapters, or
else before the layer is used again.
"""

from __future__ import annotations

from typing import Any

import torch

from rosa.algebra.lowrank import LowRank
from rosa.errors import UserError
from rosa.layers import offset
from rosa.layers.adapter import Adapter
from rosa.layers.statedict import PARTS, Arrived, Mark, Stateful, is_in_parts
from rosa.pretrained.sharding import cut_as, is_dtensor, own_part, write


def _handed(layer: Stateful, state_dict: dict[str, Any], prefix: str) -> dict[str, bool]:
    """Of the parameters that a loader looked at and hands on: whether it has written into them."""
    counted, there = layer.rosa_offset.counted, layer.rosa_offset.there()
    layer.rosa_offset.counted = {}
    keys = {offset.WEIGHT: layer.weight_path}
    return {
        key: offset.count(there[key]) != writes
        for key, writes in counted.items()
        if key in there and state_dict.get(f"{prefix}{keys.get(key, key)}") is there[key]
    }


def before_load(layer: Stateful, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before loading: take the offsets out of the weight, and note what arrives.

    Some loaders (torch.distributed.checkpoint's, which Accelerate calls) copy values into the
    parameters themselves and then hand on all of these: what is in memory already has come only
    if it was written to.
    """
    base, handed = layer.base_weight, _handed(layer, state_dict, prefix)
    weight, parameter = state_dict.get(f"{prefix}{layer.weight_path}"), base.parameter
    in_place = weight is not None and _same_memory(weight, parameter)
    brings_weight = weight is not None and weight.shape == parameter.shape
    if in_place:
        written = handed.get(offset.WEIGHT)
        if written is None:
            written = base.is_written() or _is_written_into(weight)
        brings_weight &= written if base.shard is None else base.shard.any(written)
    arrived = layer.arrived or Arrived()
    arrived.at_once |= offset.WEIGHT in handed
    for name, adapter in layer.adapters.items():
        offset.drop_stand_ins(state_dict, prefix, name)
        _note(arrived, layer.name, adapter, state_dict, prefix, handed)
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


def _note(
    arrived: Arrived,
    layer: str,
    adapter: Adapter,
    state_dict: dict[str, Any],
    prefix: str,
    handed: dict[str, bool],
) -> None:
    """Note which parts of an adapter a state dict brings to the layer of a name."""
    factors = {
        part.format(adapter.name): f for part, f in zip(PARTS, adapter.factors, strict=False)
    }
    for key, factor in factors.items():
        value = state_dict.get(prefix + key)
        if value is not None and not is_dtensor(value):
            state_dict[prefix + key] = cut_as(value, factor)
    if not factors.keys() & handed.keys():
        check_of_one_time(layer, adapter, state_dict, prefix)
    elif not any(map(handed.get, factors)) and _has_now(adapter, state_dict, prefix):
        return  # the saver has left out what was frozen
    for part in PARTS:
        key = part.format(adapter.name)
        value = state_dict.get(prefix + key)
        if value is None or not handed.get(key, True):
            continue
        alias = key in factors and key not in handed and _same_memory(value, factors[key])
        into = arrived.perhaps if alias and not _is_written_into(value) else arrived.parts
        into.setdefault(adapter.name, set()).add(part)


def _is_written_into(given: Any) -> bool:
    """Whether a state dict's alias of a parameter in shards, with its own count, was written to."""
    return is_dtensor(given) and offset.count(given) > 0


def _has_now(adapter: Adapter, state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether a state dict's offset is the one that an adapter has."""
    a, b, draws = (
        state_dict.get(f"{prefix}rosa_offset.{adapter.name}.{part}") for part in offset.PARTS
    )
    if a is None or b is None or draws is None or int(draws) != adapter.draws:
        return False
    mine = adapter.terms
    return torch.equal(a.to(mine.A), mine.A) and torch.equal(b.to(mine.B), mine.B)


def check_of_one_time(
    layer: str, adapter: Adapter, state_dict: dict[str, Any], prefix: str
) -> None:
    """Raise UserError if the factors are the adapter's own and the offset is an earlier one."""
    rest: list[Any] = [
        state_dict.get(f"{prefix}rosa_offset.{adapter.name}.{part}") for part in offset.PARTS
    ]
    values = [state_dict.get(prefix + part.format(adapter.name)) for part in PARTS[:2]]
    own = all(
        value is not None and _same_memory(value, factor)
        for value, factor in zip(values, adapter.factors, strict=True)
    )
    # It is a state dict as the model gave it: a loader has written into the offset, or has its own.
    given = own and hasattr(rest[-1], offset.BESIDE_LIVE_FACTORS)
    untouched = given and all(each.is_inference() or each._version == 0 for each in rest)
    if untouched and not _has_now(adapter, state_dict, prefix):
        raise UserError(
            "the state dict was taken before a draw or the loading of a file, and its factors of "
            f"layer {layer} are the model's own of now: with its offset they would be another "
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
