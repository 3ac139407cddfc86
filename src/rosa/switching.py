"""Switching, merging, disabling: of the whole model or not at all."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from rosa.layers.in_model import rosa_layers
from rosa.layers.undoing import ask_again, asked_of, or_else

_SWITCHED = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def all_or_none(tuner: BaseTuner, settled: bool = True) -> AbstractContextManager[None]:
    """Let all layers be asked for what they were before if not all can be brought to another state.

    Args:
        tuner: whose layers.
        settled: whether to take account first of what state dicts brought and others wrote.

    Raises:
        UserError: a layer's weight was written to by others, or an adapter was loaded in part.
    """
    layers = [layer for _, layer in rosa_layers(tuner.model)]
    wrappers = [m for m in tuner.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for layer in layers if settled else ():
        layer.settle()
    asked = [asked_of(layer) for layer in layers]
    of_wrappers = [(each.active_adapters, each.disable_adapters) for each in wrappers]
    trained = [(parameter, parameter.requires_grad) for parameter in tuner.model.parameters()]

    def undo() -> None:
        for layer, before in zip(layers, asked, strict=True):
            ask_again(layer, before)
        for wrapper, (active, disabled) in zip(wrappers, of_wrappers, strict=True):
            if wrapper.disable_adapters != disabled:
                wrapper.enable_adapters(not disabled)
            there = wrapper._get_available_adapters()
            if set(active) <= there and wrapper.active_adapters != active:
                wrapper.set_adapter(active)
        for parameter, was_trained in trained:
            if parameter.requires_grad != was_trained:
                parameter.requires_grad_(was_trained)

    return or_else(undo)


def enable_all(tuner: BaseTuner) -> None:
    """Enable the adapters in every layer, whatever fails in one: the first error is raised then.

    A `with model.disable_adapter()` ends with it: half of a model must not stay disabled.
    """
    switched = [m for m in tuner.model.modules() if isinstance(m, _SWITCHED)]
    try:
        for module in switched:
            module.enable_adapters(True)
    except BaseException:
        for module in switched:
            with contextlib.suppress(Exception):
                module.enable_adapters(True)
        raise
