"""A model is what it was before, where adding one of ROSA's adapters to it fails."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from rosa.config import RosaConfig
from rosa.layers.in_model import rosa_layers
from rosa.layers.undoing import or_else

_LOADED = "_hf_peft_config_loaded"
"""What a plain transformers model says of itself once it has an adapter."""


def or_without(model: nn.Module, adapter_name: str) -> AbstractContextManager[None]:
    """Let a model be what it was before, where adding one of ROSA's adapters to it fails.

    Its modules are those that they were, so are what is trained of them and the other adapters. An
    adapter that was there before is left alone.

    Args:
        model: a plain model, or one with adapters.
        adapter_name: of the new one.
    """
    if any(adapter_name in layer.adapters for _, layer in rosa_layers(model)):
        return nullcontext()
    configured = hasattr(model, "peft_config")
    was_loaded = vars(model).get(_LOADED)
    # Weakly: whoever holds a module or a parameter shares it, and the adapter would get a copy.
    held = [(ref(m), _weakly(m._modules), _weakly(m._parameters)) for m in model.modules()]
    trained = [(ref(parameter), parameter.requires_grad) for parameter in model.parameters()]
    wrappers = [
        (module, set(module._adapters), module._active_adapter)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]

    def undo() -> None:
        if was_loaded is None:
            vars(model).pop(_LOADED, None)
        else:
            vars(model)[_LOADED] = was_loaded
        ours = [layer for _, layer in rosa_layers(model) if adapter_name in layer.adapters]
        known: Any = getattr(model, "peft_config", None) or {}
        if not ours and not isinstance(known.get(adapter_name), RosaConfig):
            return
        for layer in reversed(ours):  # what lies inside first
            layer.delete_adapter(adapter_name)
        for wrapper, adapters, active in wrappers:
            if isinstance(wrapper, TrainableTokensWrapper) and adapter_name not in adapters:
                wrapper.token_adapter.delete_adapter(adapter_name)
            wrapper._adapters, wrapper._active_adapter = adapters, active  # type: ignore[assignment]
        for found, *parts in held:
            if (module := found()) is not None:
                for kind, known_parts in zip(("_modules", "_parameters"), parts, strict=True):
                    now = vars(module)[kind]
                    there = {n: _found(each, now.get(n)) for n, each in known_parts.items()}
                    vars(module)[kind] = there
        for parameter, was_trained in ((found(), state) for found, state in trained):
            if parameter is not None:
                parameter.requires_grad_(was_trained)
        known.pop(adapter_name, None)
        if not configured and "peft_config" in vars(model):
            del model.peft_config

    return or_else(undo)


def _weakly(parameters: Mapping[str, Any]) -> dict[str, ref[Any] | None]:
    return {name: None if each is None else ref(each) for name, each in parameters.items()}


def _found(known: ref[Any] | None, now: Any) -> Any:
    """What was there; what is, if that is no more."""
    before = None if known is None else known()
    return now if known is not None and before is None else before
