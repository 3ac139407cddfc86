"""How many items a training step shows a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rosa.resampling.processes import everyone

IGNORED = -100
"""The label that a loss leaves out, in torch and transformers."""

_HOOKS: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()
"""The counter of a model: one at a time."""


class ItemCounter:
    """Counts what the loss is a mean of, while a model runs forward in training mode.

    That is labels, but those that the loss ignores. Where the model is given none, as by a Trainer
    that computes the loss itself (label smoothing, `compute_loss_func`), it is the tokens that it
    gives logits (n, tokens, classes) for, or else the examples.

    Args:
        model: its calls are counted, until `stop`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._counts: list[Tensor | int] = []
        if (before := _HOOKS.get(model)) is not None:  # of a training that was interrupted
            before.remove()
        self._hook = model.register_forward_hook(self._count, with_kwargs=True)
        _HOOKS[model] = self._hook

    def _count(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not model.training or not torch.is_grad_enabled():  # as a reference model's passes
            return
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor):
            self._counts.append((labels != IGNORED).sum().detach())
            return
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        logits = output.get("logits") if isinstance(output, Mapping) else output
        by_token = isinstance(logits, Tensor) and logits.dim() == 3
        if labels is None and by_token and isinstance(ids, Tensor) and ids.dim() == 2:
            known = isinstance(mask, Tensor) and mask.shape == ids.shape
            self._counts.append((mask != 0).sum() if known else ids.numel())
            return
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0]
        self._counts.append(len(tensors[0]) if tensors else 1)

    def add(self, items: float) -> None:
        """Count what was counted before, as in a run that is resumed."""
        self._counts.append(torch.tensor(items))

    def counted(self) -> float:
        """How many there were so far, in this process."""
        counts = [torch.as_tensor(n).double().cpu() for n in self._counts or [0]]
        return float(torch.stack(counts).sum())

    def stop(self) -> int:
        """How many there were, in all data-parallel processes; counts no more."""
        self._hook.remove()
        total = torch.tensor(self.counted())
        everyone().add_up([total])
        return int(total)
