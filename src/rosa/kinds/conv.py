"""The adapted convolution: `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, in groups or not."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rosa.algebra.lowrank import LowRank
from rosa.algebra.sketch import Sketch
from rosa.config import RosaConfig
from rosa.layers.adapter import Adapter
from rosa.layers.base import RosaLayer
from rosa.layers.changed import check_no_dropout, is_patched, with_changed_weight
from rosa.layers.plain import in_one_precision, plain_sum
from rosa.layers.tracing import is_traced
from rosa.pretrained.views import MatrixView
from rosa.pretrained.zero3 import shape_of

_PLAIN: tuple[type[_ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class KernelView(MatrixView):
    """A kernel (out, in / groups, *size) as a matrix (out, in / groups * size)."""

    @property
    def matrix(self) -> Tensor:
        """Its memory as a matrix.

        A kernel whose memory is in another order than its shape (channels_last) is given torch's
        own first, for no matrix has that memory; the inputs may stay as they are.
        """
        weight = self.parameter
        if not weight.is_contiguous():
            weight.data = weight.data.contiguous()
        return self.as_matrix(weight.detach())

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A kernel as a matrix."""
        return weight.flatten(1) if weight.dim() > 2 else weight  # fewer are a shard's

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix as a kernel."""
        return matrix.reshape(-1, *shape_of(self.parameter)[1:])


def _convolves(base: nn.Module) -> bool:
    """Whether it convolves as torch does; a subclass may change its inputs or its weight."""
    kind = next(kind for kind in _PLAIN if isinstance(base, kind))
    names = ("forward", "_conv_forward")
    return not is_patched(base) and all(getattr(type(base), n) is getattr(kind, n) for n in names)


class RosaConv(RosaLayer):
    """ROSA on a convolution: A is r kernels of one group's inputs, B mixes them to outputs.

    In groups, each group's inputs meet the same A, and its outputs have their rows of B: that is
    the change s B A of the kernel as a matrix (out, in / groups * size), of rank r. A subclass that
    computes otherwise, as one that pads its inputs first, is called with the changed kernel.
    """

    adapts = "torch.nn.Conv1d, Conv2d, Conv3d"

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is a convolution; a transposed one is not."""
        return isinstance(module, _PLAIN)

    @staticmethod
    def numbers(base: nn.Module) -> int | None:
        """How many numbers the whole weight has."""
        assert isinstance(base, _ConvNd)
        size = torch.Size(base.kernel_size).numel()
        return base.out_channels * (base.in_channels // base.groups) * size

    @staticmethod
    def view_of(base: nn.Module, parameter: str) -> MatrixView:
        """The kernel as (out, in / groups * size)."""
        return KernelView(base, parameter)

    @staticmethod
    def as_lora(base: nn.Module, change: LowRank) -> tuple[Tensor, Tensor]:
        """The factors as kernels, where PEFT's LoRA computes the same with them."""
        assert isinstance(base, _ConvNd)
        if not _convolves(base):
            raise ValueError(f"LoRA knows nothing of what {type(base).__name__} computes")
        if base.groups > 1:
            raise ValueError("LoRA's product of a convolution in groups goes across the groups")
        if any(step != 1 for step in base.dilation) or base.padding_mode != "zeros":
            raise ValueError("LoRA knows no dilation and no padding but zeros")
        ones = (1,) * len(base.kernel_size)
        a = change.A.reshape(len(change.A), -1, *base.kernel_size)
        return a, change.B.reshape(*change.B.shape, *ones)

    def update_layer(
        self, adapter_name: str, r: int, alpha: float | None, config: RosaConfig
    ) -> None:
        """Add an adapter; ValueError for dropout where the product has no inputs of its own."""
        if not _convolves(self._conv):
            check_no_dropout(self.name, config)
        super().update_layer(adapter_name, r, alpha, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus ``s B A * x`` per active adapter; ([n,] channels, *size)."""
        active = self._in_use(x, is_traced())
        if active and not _convolves(self._conv):
            return with_changed_weight(self, x, *args, **kwargs)
        return plain_sum(self, active, self._product, x, *args, look=self._look, **kwargs)

    def _product(self, adapter: Adapter, x: Tensor) -> Tensor:
        (x, a, b), dropout = in_one_precision(self, adapter, x), self.rosa_dropout[adapter.name]
        hidden = self._convolved(dropout(x), a)
        return self._mixed(hidden * adapter.scaling, b)

    @property
    def _conv(self) -> _ConvNd:
        return cast(_ConvNd, self.get_base_layer())

    def _convolved(self, x: Tensor, a: Tensor) -> Tensor:
        """Rows (r, in / groups * size) as kernels over each group: (..., groups * r, *size)."""
        conv = self._conv
        kernels = a.reshape(len(a), -1, *conv.kernel_size)
        kernels = kernels.repeat(conv.groups, *(1 for _ in kernels.shape[1:]))
        return conv._conv_forward(x, kernels, None)  # type: ignore[operator]

    def _mixed(self, hidden: Tensor, b: Tensor) -> Tensor:
        """Each group's r channels mixed to its outputs by its rows of b (out, r)."""
        conv = self._conv
        ones = (1,) * len(conv.kernel_size)
        mix = getattr(nn.functional, f"conv{len(ones)}d")
        return mix(hidden, b.reshape(*b.shape, *ones), groups=conv.groups)

    def _look(self, sketch: Sketch, grad: Tensor, x: Tensor) -> None:
        """Let a sketch see the gradient of the outputs, without the inputs' patches."""
        groups, dims = self._conv.groups, len(self._conv.kernel_size)
        test = sketch.test.to(x.device)
        seen = self._convolved(x.to(test.dtype), test.T)
        seen, grad = (t.flatten(-dims).unflatten(-2, (groups, -1)) for t in (seen, grad))
        found = torch.einsum("...gpl,...gol->pgo", seen, grad.to(seen.dtype))
        sketch.add_projected(found.flatten(1))
