"""The effective weight of an adapted layer, for code that reads `.weight` instead of calling it.

Some models do: attention that is computed by a function of its weights, state space models. Many
only ask for its precision. So the weight is multiplied out when a value of it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rosa.algebra.lowrank import full_precision, transposed
from rosa.algebra.sketch import Sketch
from rosa.errors import UserError
from rosa.layers.adapter import Adapter
from rosa.layers.tracing import is_traced
from rosa.pretrained.sharding import is_dtensor
from rosa.pretrained.versions import is_counted, unpack
from rosa.pretrained.views import MatrixView


def effective_weight(
    weight: Tensor, adapter: Adapter, view: MatrixView, note: Callable[[], None] | None
) -> Tensor:
    """``W + s B A`` in the shape and precision of W; differentiable.

    Args:
        weight: W, as it is stored.
        adapter: whose product it is, and whose sketch is to see the gradient, if it has one.
        view: how W is a matrix (out, in).
        note: is called when a value is first needed; None computes it now.
    """
    how = weight, *adapter.factors, adapter.scaling, view
    if is_traced():  # where no setting of torch's can be changed for a while
        return _product(*how)
    return _Read.apply(*how, adapter.sketch, note)  # type: ignore[return-value]


def _product(weight: Tensor, a: Tensor, b: Tensor, scaling: float, view: MatrixView) -> Tensor:
    if any(map(is_dtensor, (weight, a, b))):
        raise UserError(
            f"a weight of {type(view.module).__name__} is asked for while it is spread over "
            "processes: in FSDP call fully_shard on a module that holds it and its adapter, and "
            "read it in a forward pass of that; in tensor parallelism leave the layer out"
        )
    return weight + view.as_stored((b * scaling) @ a).to(weight.dtype)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        view: MatrixView,
        sketch: Sketch | None,
        note: Callable[[], None] | None,
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scaling, ctx.view, ctx.sketch = scaling, view, sketch
        if note is None:
            with full_precision():
                return _product(weight, a, b, scaling, view)
        return _Unread(note, weight.detach(), a.detach(), b.detach(), scaling, view)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b = unpack(ctx)
        (grad,) = grads
        full = ctx.view.as_matrix(grad.to_dense())  # an embedding may give a sparse one
        if ctx.sketch is not None:
            with torch.no_grad():
                ctx.sketch.add_gradient(full)
        full = full.to(a.dtype)
        for_weight, for_a, for_b, *_ = ctx.needs_input_grad
        grad_a = ctx.scaling * (transposed(b) @ full) if for_a else None
        grad_b = ctx.scaling * (full @ transposed(a)) if for_b else None
        return grad if for_weight else None, grad_a, grad_b, None, None, None, None


class _Unread(Tensor):
    """The product as a tensor that is computed by the first operation on it, and then kept."""

    @staticmethod
    def __new__(cls, note: Callable[[], None], weight: Tensor, *_: Any) -> _Unread:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, weight.shape, strides=weight.stride(), dtype=weight.dtype, device=weight.device
        )

    def __init__(self, note: Callable[[], None], *how: Any) -> None:
        self._note, self._how, self._read = note, how, None
        self._then = self._counts()

    def _counts(self) -> list[int]:
        """How often the weight and the factors were written to; a weight's state has its own."""
        return [each._version for each in self._how[:3] if is_counted(each)]

    def _value(self) -> Tensor:
        if self._read is None:
            if self._counts() != self._then:
                raise UserError(
                    "a layer's weight was asked for, and another adapter made active, merged, "
                    "disabled or drawn again, or the factors stepped or loaded, before a value of "
                    "it was read: it would be of both. Read it at once: layer.weight.clone()"
                )
            self._note()
            with torch.no_grad(), full_precision():
                self._read = _product(*self._how)
        return self._read

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = args[0] if func._schema.is_mutable and args else None
        if isinstance(written, _Unread):
            raise UserError(
                "the weight of an adapted layer is a sum of the weight in memory and the factors: "
                "it can be read but not written to. Write into its base_layer.weight inside "
                "model.disable_adapter(), or merge the adapter first"
            )
        return func(*tree_map(_read, args), **tree_map(_read, kwargs or {}))


def _read(value: Any) -> Any:
    return value._value() if isinstance(value, _Unread) else value
