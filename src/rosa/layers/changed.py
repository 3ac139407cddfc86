"""Calling a module with the changed weight in the place of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.layers.base import RosaLayer
from rosa.layers.front import call_with, in_turn
from rosa.layers.plain import with_forward
from rosa.pretrained.zero3 import is_in_part


def with_changed_weight(layer: RosaLayer, *args: Any, **kwargs: Any) -> Any:
    """What the layer's module computes of these with W_0 + O + s B A for its weight.

    For modules of which nothing is known but that they use the weight. The changed weight is
    computed at every call, and kept for the backward pass.

    Raises:
        UserError: an active adapter has dropout.
    """
    for adapter in layer.adapters_in_use:
        check_no_dropout(layer.name, adapter.config)
    if is_in_part(layer.base_weight.parameter):  # which the module's own hooks make whole
        with with_forward(layer.get_base_layer(), partial(_with_the_weight, layer)):
            return layer.base_layer(*args, **kwargs)
    path = layer.weight_path.removeprefix("base_layer.")
    with in_turn():
        return call_with(layer, layer.changed_weight(), path, layer.base_layer, args, kwargs)


def _with_the_weight(
    layer: RosaLayer, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What a module's forward makes of these with the changed weight, inside its hooks.

    The weight is found before the parameter, which stays where DeepSpeed looks for it.
    """
    name, inside = layer.parameter_name, vars(layer.get_base_layer())
    if name in inside:  # the module calls itself
        return forward(*args, **kwargs)
    inside[name] = layer.changed_weight()
    try:
        return forward(*args, **kwargs)
    finally:
        del inside[name]


def is_patched(base: nn.Module) -> bool:
    """Whether a module was given a forward of its own, which may be any; not by accelerate."""
    return "forward" in vars(base) and not hasattr(base, "_hf_hook")


def check_not_patched(base: nn.Module) -> None:
    """Raise ValueError for a module with a forward of its own, beside which LoRA's product lies."""
    if is_patched(base):
        raise ValueError(
            f"{type(base).__name__} was given a forward of its own, which uses the changed "
            "weight; LoRA adds its product beside it"
        )


def check_no_dropout(layer: str, config: RosaConfig) -> None:
    """Raise ValueError for dropout in such a layer: its product has no inputs of its own."""
    if config.rosa_dropout > 0:
        raise UserError(f"the weight of {layer} is changed as a whole: leave rosa_dropout at 0")
