"""The adapted linear layer: `nn.Linear`, or transformers' `Conv1D`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from rosa.algebra.lowrank import LowRank
from rosa.layers.base import RosaLayer
from rosa.layers.changed import check_not_patched, is_patched, with_changed_weight
from rosa.layers.fused import adapted_linear, can_fuse
from rosa.layers.plain import guarded, linear_product, plain_sum
from rosa.layers.tensor_parallel import add_parallel, look_at_all, parallel_product
from rosa.layers.tracing import is_traced
from rosa.pretrained.sharding import is_dtensor
from rosa.pretrained.views import MatrixView
from rosa.pretrained.weight import SUPPORTED_DTYPES


class RosaLinear(RosaLayer):
    """ROSA on `nn.Linear` or on transformers' `Conv1D` (a linear layer stored transposed)."""

    adapts = "torch.nn.Linear, transformers' Conv1D"
    is_linear = True
    runs_in_shards = True

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is a linear layer."""
        return isinstance(module, (nn.Linear, Conv1D))

    @staticmethod
    def is_plain(base: nn.Module) -> bool:
        """Whether a linear layer computes what one does; a subclass may do something else."""
        own = type(base).forward is not nn.Linear.forward or is_patched(base)
        if isinstance(base, NonDynamicallyQuantizableLinear):
            return False  # attention reads its weight
        if not isinstance(base, nn.Linear) or not own or base.weight.is_meta:
            return True
        if is_dtensor(base.weight):
            return True  # by a forward that takes and gives the shards of tensor parallelism
        if base.weight.dtype not in SUPPORTED_DTYPES or not base.weight.numel():
            return True  # refused for that, by name
        probe = torch.linspace(-1, 1, base.in_features, device=base.weight.device)[None]
        probe = probe.to(base.weight.dtype)
        try:
            with torch.no_grad():
                found, expected = base.forward(probe), nn.Linear.forward(base, probe)
        except Exception:  # it wants other arguments
            return False
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        eps = torch.finfo(expected.dtype).eps
        close = float((found - expected).norm()) <= 32 * eps * float(expected.norm())
        return close or not bool(expected.isfinite().all())  # a broken weight is refused by name

    @staticmethod
    def numbers(base: nn.Module) -> int | None:
        """How many numbers the whole weight has."""
        return base.in_features * base.out_features if isinstance(base, nn.Linear) else None

    @staticmethod
    def view_of(base: nn.Module, parameter: str) -> MatrixView:
        """The weight as (out, in), as which Conv1D does not store it."""
        return MatrixView(base, parameter, transposed=isinstance(base, Conv1D))

    @staticmethod
    def as_lora(base: nn.Module, change: LowRank) -> tuple[Tensor, Tensor]:
        """The factors; ValueError where the module makes something else of its weight by now."""
        if base.weight.is_meta or not RosaLinear.is_plain(base):
            check_not_patched(base)
        return change.A, change.B

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus ``s B A x`` per active adapter; (..., in) to (..., out)."""
        traced = is_traced()
        active = self._in_use(x, traced)
        if len(active) == 1 and not args and not kwargs and not traced:
            (one,) = active
            (a, b), dropout = one.factors, self.rosa_dropout[one.name]
            if isinstance(dropout, nn.Identity) and can_fuse(self.base_layer, x, a):
                out = adapted_linear(self.base_layer, x, a, b, one.scaling, one.sketch)
                return guarded(self, out) if self.base_weight.is_lent else out
        if active and self.is_in_shards:
            product, look = partial(parallel_product, self), partial(look_at_all, self)
            return plain_sum(self, active, product, x, *args, look=look, add=add_parallel, **kwargs)
        if active and is_patched(self.base_layer):
            return with_changed_weight(self, x, *args, **kwargs)
        return plain_sum(self, active, partial(linear_product, self), x, *args, **kwargs)
