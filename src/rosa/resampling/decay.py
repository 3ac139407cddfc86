"""Weight decay that pulls the factors toward what they were drawn as, not toward zero.

Weight decay keeps small what a model learns. ROSA's factors begin as a part of the pretrained
weight: decay toward zero wears that part away, and every draw exposes another one to it. Decay
toward the drawn values holds back what was learned, as it does in other methods.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rosa.layers.adapter import Adapter
from rosa.pretrained.sharding import cut_as, is_dtensor
from rosa.resampling.optimizers import stepping
from rosa.resampling.zero import partitioned

_SEEN_TO: weakref.WeakKeyDictionary[Adapter, weakref.ref[DecayTowardDrawn]] = (
    weakref.WeakKeyDictionary()
)
"""Who gives back to an adapter: one at a time."""


def _nobody() -> None:
    return None


class DecayTowardDrawn:
    """Moves the point that an optimizer's weight decay pulls the factors to.

    AdamW takes ``lr * weight_decay * p`` from a parameter p at every step (Loshchilov and Hutter,
    arXiv:1711.05101); a hook after the step gives ``lr * weight_decay * p0`` back, with p0 what was
    drawn. A copy of p0 is kept, r (in + out) numbers a weight, and none without weight decay.

    Args:
        optimizer: see `rosa.resample`. One whose weight decay goes through the gradient
            (Adam, SGD), or is unknown, is left as it is, with a warning if it decays the factors.
        adapters: that are trained.
    """

    def __init__(self, optimizer: Any, adapters: list[Adapter]) -> None:
        factors = [factor for adapter in adapters for factor in adapter.factors]
        self._parts = partitioned(optimizer)
        held = {id(factor) for factor in factors}
        held |= {id(part) for zero in self._parts for part in zero.parts_of(factors)}
        steps = [(one, one.param_groups) for one in stepping(optimizer, factors)]
        steps += [(zero.inner, zero.stepped()) for zero in self._parts]
        decaying = [(one, found) for one, groups in steps if (found := _decaying(groups, held))]
        optimizers = [one for one, _ in decaying]
        decayed = {i for _, groups in decaying for group in groups for i in _ids(group)}
        for zero in self._parts:
            decayed |= {id(f) for f in factors if decayed & set(map(id, zero.parts_of([f])))}
        self._adapters = [a for a in adapters if decayed & set(map(id, a.factors))]
        self._drawn: dict[nn.Parameter, Tensor] = {}  # of what the optimizers step
        unknown = [one for one in optimizers if not _is_decoupled(one)]
        if unknown:
            kind = type(unknown[0]).__name__
            warnings.warn(
                f"the weight decay of {kind} pulls ROSA's factors toward zero, and they hold a "
                "part of the pretrained weight: use torch's AdamW, or no weight decay",
                stacklevel=2,
            )
            self._adapters = []
        for adapter in self._adapters:
            before = _SEEN_TO.get(adapter, _nobody)()
            if before is not None:  # of a training that was interrupted
                before._adapters = [a for a in before._adapters if a is not adapter]
                before.refresh()
            _SEEN_TO[adapter] = weakref.ref(self)
        self._hooks = [
            one.register_step_post_hook(self._give_back) for one in optimizers if self._adapters
        ]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take note of what was drawn, by a draw or in a state dict."""
        self._drawn, self._terms = {}, [adapter.terms for adapter in self._adapters]
        for adapter in self._adapters:
            a, b = adapter.factors
            if (drawn := adapter.drawn()) is not None:
                for factor, value in ((a, drawn.A), (b, drawn.B / adapter.scaling)):
                    value = value.to(factor.device, factor.dtype)
                    self._drawn[factor] = cut_as(value, factor)
        for zero in self._parts:
            parts = zero.spread(self._drawn)
            self._drawn = {f: v for f, v in self._drawn.items() if id(f) not in zero.held()}
            self._drawn |= parts

    @torch.no_grad()
    def _give_back(self, optimizer: Optimizer, *_: Any) -> None:
        if any(a.terms is not t for a, t in zip(self._adapters, self._terms, strict=True)):
            self.refresh()
        for group in optimizer.param_groups:
            share = float(group["lr"] * group.get("weight_decay", 0.0))
            held = [p for p in group["params"] if p in self._drawn and p.grad is not None]
            skips = getattr(optimizer, "found_inf", None)  # a fused kernel's, under a GradScaler
            for alike in (list(filter(is_dtensor, held)), [p for p in held if not is_dtensor(p)]):
                drawn = [self._drawn[p] for p in alike]
                if skips is not None:  # the step was none where this is 1
                    drawn = [torch.where(skips.to(p.device) > 0, 0.0, p) for p in drawn]
                if share and alike:
                    torch._foreach_add_(alike, drawn, alpha=share)  # type: ignore[attr-defined]

    def stop(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()
        self._adapters = []


def _ids(group: dict[str, Any]) -> list[int]:
    return [id(p) for p in group["params"]]


def _decaying(groups: list[dict[str, Any]], factors: set[int]) -> list[dict[str, Any]]:
    """The parameter groups with weight decay that hold factors."""
    return [g for g in groups if g.get("weight_decay") and factors & set(_ids(g))]


def _is_decoupled(optimizer: Any) -> bool:
    groups = [group for group in optimizer.param_groups if group.get("weight_decay")]
    return isinstance(optimizer, AdamW) or (
        isinstance(optimizer, Optimizer)
        and all(group.get("decoupled_weight_decay") for group in groups)
    )
