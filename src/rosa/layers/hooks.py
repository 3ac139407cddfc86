"""Calling a module with its hooks around more than its own forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from rosa.layers.tracing import is_traced

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def within_hooks(
    module: nn.Module, compute: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``compute(module, x, ...)``, inside the module's own hooks if it has any.

    They then see, and may change, the inputs and outputs of all that is computed, as they would of
    the module alone. Where calls are traced they stay around the module.

    Args:
        module: with or without hooks.
        compute: is given what to call for the module's part, and then its inputs.
        x: the first of these.
        args: others.
        kwargs: and those by name.
    """
    if is_traced() or not any(getattr(module, name) for name in _HOOKS):
        return compute(module, x, *args, **kwargs)
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = partial(compute, module.forward)
    try:
        return module(x, *args, **kwargs)
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
