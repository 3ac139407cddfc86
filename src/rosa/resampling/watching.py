"""Looking where the loss falls, for the draws that follow the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from rosa.errors import UserError
from rosa.layers.adapter import Adapter
from rosa.pretrained.sharding import reshard
from rosa.resampling.active import Active, active_adapters


def watch(model: nn.Module) -> int:
    """Begin to look where the loss falls, for the next draw with ``directions="gradient"``.

    From now on every ordinary backward pass adds a projection of each weight's loss gradient to a
    small sum (`algebra.sketch`), until the next `resample` draws from it. A few steps are enough;
    each costs, while it is watched, about what a LoRA of rank r + 8 would add.

    Returns:
        The number of weights that are watched: those of active adapters with that setting, whose
        draws are informed.

    Raises:
        ValueError: as `resample` does.
    """
    found = [active for active in active_adapters(model) if active.is_informed]
    for active in found:
        active.watch()
    return len(found)


def look(
    model: nn.Module,
    found: list[Active],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> None:
    """Watch the backward passes of some batches; gradients and norms' statistics stay as they are.

    Raises:
        ValueError: a batch gives no loss.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose gradients are not wanted: nor that processes exchange them
    for active in found:
        active.watch()
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    statistics = [(b, b.clone()) for b in _statistics(model)]
    device = next(model.parameters()).device
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for batch in batches:
            with torch.enable_grad():
                value = (loss or _own_loss)(model, send_to_device(batch, device))
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise UserError(
                    "a batch gave no loss to differentiate: give batches with labels that "
                    "model(**batch) computes a loss of, or loss=function(model, batch)"
                )
            value.backward()
    except BaseException:
        for active in found:
            active.adapter.sketch = None
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, values in statistics:
            buffer.copy_(values)
        reshard(model)


def _statistics(model: nn.Module) -> list[Tensor]:
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, str):  # a key of one, which was gone through
        raise UserError("batches is a list of batches: give one of them as [batch]")
    if not isinstance(batch, Mapping):
        raise UserError(
            f"a batch is a {type(batch).__name__}, not the model's arguments by name: give "
            "loss=function(model, batch) to say how its loss is computed"
        )
    return getattr(model(**batch), "loss", None)  # type: ignore[return-value]  # is checked


def warn_of_blind(found: list[Active]) -> None:
    """Warn of weights whose gradient was not seen, after a `watch` or at their first resample."""
    blind = [active.name for active in found if _is_blind(active.adapter)]
    if blind:
        warnings.warn(
            f"no gradient was seen of {len(blind)} of {len(found)} weights, such as {blind[0]}: "
            "random directions are drawn for them. Call rosa.watch(model) a few steps before "
            "rosa.resample, or give it batches; if you did, their loss is 0, NaN or infinite, or "
            "the model is compiled (torch.compile, TrainingArguments(torch_compile=True)), whose "
            "backward pass is not seen: draw by directions='orthonormal' there",
            stacklevel=3,
        )


def _is_blind(adapter: Adapter) -> bool:
    if adapter.sketch is None:
        return adapter.draws <= 1
    return adapter.sketch.is_empty()
