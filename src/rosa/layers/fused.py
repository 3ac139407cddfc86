"""A linear layer with a low-rank product added, without temporaries of the size of its output.

Added up by autograd, ``W x + s B (A x)`` makes a second output to add to the first, and in the
backward pass a second gradient of the input. Here the product is accumulated into the first one by
the matrix multiplication itself, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rosa.algebra.sketch import Sketch
from rosa.errors import UserError
from rosa.layers.tracing import has_hooks, is_traced
from rosa.pretrained.versions import unpack


def can_fuse(base: nn.Module, x: Tensor, factor: Tensor) -> bool:
    """Whether `adapted_linear` computes what calling the base layer and adding would compute.

    Not where someone watches or replaces the base layer's call, where precisions differ and
    autocast does not make them one, and not under compilation, tracing, export, `torch.func` and
    forward-mode differentiation, which know the plain form only.
    """
    return (
        type(base) in (nn.Linear, Conv1D)
        and type(x) in (Tensor, nn.Parameter)
        and not x.is_nested
        and not is_traced()
        and "forward" not in base.__dict__
        and not has_hooks(base)
        and _one_dtype(x, factor, base.weight)  # type: ignore[arg-type]
        and not nn.modules.module._has_any_global_hook()
    )


def _one_dtype(*tensors: Tensor) -> bool:
    """Whether they are multiplied in one precision as they are, or by autocast."""
    dtypes = {t.dtype for t in tensors}
    if _is_autocast(tensors[0]):
        return torch.float64 not in dtypes  # which autocast leaves alone
    return len(dtypes) == 1


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type  # of which torch refuses to tell where there is none, as on meta
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def adapted_linear(
    base: nn.Module, x: Tensor, a: Tensor, b: Tensor, scaling: float, sketch: Sketch | None = None
) -> Tensor:
    """``x (W + s B A)^T + bias``: (..., in) to (..., out); differentiable, twice too.

    Under autocast all are cast to its precision first, as `F.linear` would, but the input once for
    W and A; the gradients come back in each one's own precision.

    Args:
        base: the linear layer (or Conv1D) with W (out, in) and perhaps a bias.
        x: the input; of `base`'s precision, as are `a` and `b`, unless autocast is on.
        a: the factor A, (r, in).
        b: the factor B, (out, r).
        scaling: s.
        sketch: what is to see the weight's gradient, if something is.
    """
    weight: Tensor = base.weight.T if isinstance(base, Conv1D) else base.weight  # type: ignore
    bias: Tensor | None = base.bias  # type: ignore[assignment]
    if _is_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, a, b = (t.to(dtype) for t in (x, weight, a, b))
        bias = None if bias is None else bias.to(dtype)
    out = _AdaptedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scaling, sketch)
    return out.view(*x.shape[:-1], out.shape[-1])  # type: ignore[union-attr]


class _AdaptedLinear(torch.autograd.Function):
    """On rows: x (n, in), weight (out, in), bias (out) or None, a (r, in), b (out, r).

    The thin products are computed as (r, n), and added to the transposed outputs: BLAS is
    faster so than on (n, r), which holds one row of r numbers after the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        s: float,
        sketch: Sketch | None,
    ) -> Tensor:
        hidden = a @ x.T
        if s != 1.0:
            hidden *= s  # r numbers a row, not the whole output
        _, for_weight, _, for_a, for_b, *_ = ctx.needs_input_grad
        keeps_x = for_weight or for_a or sketch is not None
        ctx.save_for_backward(x if keeps_x else None, weight, a, b, hidden if for_b else None)
        ctx.s, ctx.sketch = s, sketch
        out = F.linear(x, weight, bias)
        out.T.addmm_(b, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, weight, a, b, hidden = unpack(ctx)
        if ctx.sketch is not None:
            with torch.no_grad():
                ctx.sketch.add(grad.detach(), x.detach())
        for_x, for_weight, for_bias, for_a, for_b, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() and for_b and (for_x or for_a):  # to be differentiated again
            if x is None:
                raise UserError(
                    "second derivatives need the inputs of the layers, which are not kept where B "
                    "alone is trained: use RosaConfig(trained='both')"
                )
            hidden = a @ x.T * ctx.s  # what was kept has no history
        inner = b.T.contiguous() @ grad.T
        if ctx.s != 1.0:
            inner = inner * ctx.s
        grad_x = None
        if for_x:
            grad_x = grad @ weight
            grad_x.T.addmm_(a.T, inner)
        return (
            grad_x,
            grad.T @ x if for_weight else None,
            grad.sum(0) if for_bias else None,
            inner @ x if for_a else None,
            (hidden @ grad).T if for_b else None,
            None,
            None,
        )
