"""What an adapted layer computes in plain operations, inside the base layer's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosa.algebra.sketch import Sketch
from rosa.layers.adapter import Adapter, watched
from rosa.layers.base import RosaLayer
from rosa.layers.tracing import has_hooks, is_traced
from rosa.pretrained.versions import Unchanged


def within_hooks(
    module: nn.Module, compute: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``compute(module, x, ...)``, inside the module's own hooks if it has any.

    They then see, and may change, the inputs and outputs of all that is computed, as they would of
    the module alone. Where calls are traced those of the backward pass see nothing.

    Args:
        module: with or without hooks.
        compute: is given what to call for the module's part, and then its inputs.
        x: the first of these.
        args: others.
        kwargs: and those by name.
    """
    if not has_hooks(module):
        return compute(module, x, *args, **kwargs)
    if is_traced():
        return _between_hooks(module, compute, (x, *args), kwargs)
    with with_forward(module, compute):
        return module(x, *args, **kwargs)


@contextmanager
def with_forward(module: nn.Module, compute: Callable[..., Any]) -> Iterator[None]:
    """While calls of a module, its hooks around them, give what is computed with its forward.

    Args:
        module: one to be called.
        compute: is given the module's forward, and then what that would be given.
    """
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = partial(compute, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _between_hooks(
    module: nn.Module, compute: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The same by calling the hooks, as torch does: for tracers, which follow no other call."""
    for key, before in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            given: Any = before(module, args, kwargs)  # type: ignore[call-arg]
            args, kwargs = (args, kwargs) if given is None else given
        elif (given := before(module, args)) is not None:  # type: ignore[call-arg]
            args = given if isinstance(given, tuple) else (given,)
    result = compute(module.forward, *args, **kwargs)
    for key, after in module._forward_hooks.items():
        named = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        given = after(module, args, *named, result)  # type: ignore[call-arg]
        result = result if given is None else given
    return result


def plain_sum(
    layer: RosaLayer,
    active: list[Adapter],
    product: Callable[[Adapter, Tensor], Tensor],
    x: Tensor,
    *args: Any,
    look: Callable[[Sketch, Tensor, Tensor], None] = Sketch.add,
    add: Callable[[Tensor, Tensor], Tensor] = torch.add,
    beside: Callable[[Tensor, Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """The base layer's output of x plus the products of the active adapters, in its precision.

    Args:
        layer: the adapted layer.
        active: its adapters that are added.
        product: ``s B A x`` of an adapter, in the shape of the output.
        x: the inputs.
        args: further ones of the base layer.
        look: see `watched`.
        add: adds a product to the output.
        beside: takes the base layer's outputs and the inputs, and adds what else is to be added.
        kwargs: and those by name.
    """

    def compute(base: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = base(x, *args, **kwargs)
        dtype = result.dtype
        if beside is not None:
            result = beside(result, x)
        for adapter in active:
            result = add(result, product(adapter, x))
        result = result.to(dtype)
        if active and result.requires_grad and not is_traced():
            if x.requires_grad:
                result = guarded(layer, result)
            result = watched(result, x, active, look)
        return result

    return within_hooks(layer.base_layer, compute, x, *args, **kwargs)


def guarded(layer: RosaLayer, result: Tensor) -> Tensor:
    """A layer's result that is not gone backward through once its weight has changed."""
    base = layer.base_weight
    if base.standing and result.requires_grad:
        # Of a weight in shards torch counts no changes: they are written past its tensor, and for a
        # pass it may be gathered anew.
        in_shards = base.is_lent or base.shard is not None
        standing = partial(getattr, base, "standing") if in_shards else None
        return Unchanged.apply(result, base.parameter, standing)  # type: ignore[return-value]
    return result


def in_one_precision(
    layer: RosaLayer, adapter: Adapter, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's inputs in the precision of an adapter's factors, and these.

    Where `peft.helpers.disable_input_dtype_casting` leaves the inputs as they are, these are cast:
    hooks that cast each module's own weights for its forward pass do not reach them.
    """
    a, b = adapter.factors
    if not layer.cast_input_dtype_enabled and x.is_floating_point():
        return x, a.to(x.dtype), b.to(x.dtype)
    return layer._cast_input_dtype(x, a.dtype), a, b


def linear_product(layer: RosaLayer, adapter: Adapter, x: Tensor) -> Tensor:
    """``s B A x`` of an adapter of a linear layer, with dropout: (..., in) to (..., out)."""
    (x, a, b), dropout = in_one_precision(layer, adapter, x), layer.rosa_dropout[adapter.name]
    hidden = F.linear(dropout(x), a)
    if adapter.scaling != 1.0:
        hidden = hidden * adapter.scaling  # on r numbers a token, not on the whole output
    return F.linear(hidden, b)
