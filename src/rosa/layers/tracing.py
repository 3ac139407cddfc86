"""Whether someone looks at the operations of a call, or transforms them."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own, which see or change what its call gives."""
    return any(getattr(module, name) for name in _HOOKS)


def is_traced() -> bool:
    """Whether a call is compiled, exported, traced, or transformed by `torch.func` or forward AD.

    Then it is to be made of plain operations: autograd Functions of our own, and what is only of
    use to one backward pass, are in the way.
    """
    compiler = torch.compiler
    is_exporting = getattr(compiler, "is_exporting", compiler.is_compiling)  # torch < 2.7 has none
    return (
        compiler.is_compiling()
        or is_exporting()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
    )
