"""What is loaded into a layer in ZeRO 3's parts, of which a state dict holds nothing.

DeepSpeed restores the parts by itself, after it has handed on a state dict of all else: of that the
offsets are taken. The pretrained weight is then what it was, since an engine's checkpoint is of its
own model. Any other loading would miss the parts, and is refused.
"""

from __future__ import annotations

import traceback
from typing import Any

from rosa.errors import UserError
from rosa.layers import arriving, statedict
from rosa.layers.offset import MARK
from rosa.layers.statedict import Stateful, is_in_parts


def check_not_in_parts(layer: Stateful) -> None:
    """Raise UserError for a layer whose factors are in ZeRO 3's parts, which a load would miss."""
    if is_in_parts(layer):
        raise UserError(
            "the model is in parts over processes (ZeRO 3), of which a state dict holds nothing: "
            "load the adapter before deepspeed.initialize, or a checkpoint by "
            "engine.load_checkpoint"
        )


def before_load(layer: Stateful, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """A hook before loading, as `arriving.before_load`, which it is for a layer not in parts."""
    if not is_in_parts(layer):
        arriving.before_load(layer, state_dict, prefix, *others)
        return
    if not _is_by_deepspeed():
        check_not_in_parts(layer)
    arrived = statedict.Arrived()
    for name, now in statedict.marks_of(layer).items():
        mark = state_dict.get(f"{prefix}rosa_offset.{name}.{MARK}")
        if mark is not None and int(mark) != now:
            raise UserError(
                f"the checkpoint was written with adapter {name!r} active, merged or disabled in "
                f"layer {layer.name} as it is not now: make it so (set_adapter, merge_adapter) "
                "before engine.load_checkpoint"
            )
        keys = {part: prefix + part.format(name) for part in statedict.PARTS}
        arrived.parts[name] = {part for part, key in keys.items() if key in state_dict}
    if any(arrived.parts.values()):
        layer.bare()
        layer.arrived = arrived
    layer.base_weight.expect_write()  # of nothing, into an empty parameter


def _is_by_deepspeed() -> bool:
    callers = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_stack(None))
    return "deepspeed.runtime.engine" in callers
