"""The adapted quantized linear layer: its weight is never touched, the offset is added to outputs.

A weight in 8 or 4 bits cannot hold what is merged into it: it would be rounded away, draw by draw.
So what stands in the weight of other layers is here a low-rank product beside it, exact.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend, TorchaoBackend
from torch import Tensor, nn
from torch.nn import functional as F

from rosa.algebra.lowrank import LowRank
from rosa.errors import UserError
from rosa.layers.base import RosaLayer
from rosa.layers.plain import linear_product, plain_sum
from rosa.layers.tracing import is_traced
from rosa.pretrained.views import MatrixView
from rosa.pretrained.weight import BaseWeight

_LIBRARIES = ("bitsandbytes", "hqq", "torchao")


def backend_of(module: nn.Module) -> QuantizationBackend | None:
    """How PEFT reads and writes a module's quantized weight; None for a module without one."""
    if not any(name in sys.modules for name in _LIBRARIES):  # else looking would import them
        return None
    return resolve_quantization_backend(module, get_apply_tensor_subclass=_unknown)


def _unknown() -> Any:
    raise UserError(
        "merging into weights of torchao needs the config that they were quantized with, which the "
        "model does not hold: load it by from_pretrained(quantization_config=TorchAoConfig(...))"
    )


class QuantizedView(MatrixView):
    """A quantized weight as a matrix (out, in): each look at it is a dequantized copy."""

    @property
    def matrix(self) -> Tensor:
        """A copy of the weight: what is written there is lost."""
        backend = backend_of(self.module)
        assert backend is not None
        return backend.get_base_weight(self.module).detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, without dequantizing it."""
        return self.module.out_features, self.module.in_features  # type: ignore[return-value]


class QuantizedWeight(BaseWeight):
    """A weight that stays as it is; the changes that are in force are held beside it."""

    def __init__(
        self, name: str, view: MatrixView, fingerprint: tuple[float, float] | None = None
    ) -> None:
        super().__init__(name, view, fingerprint)
        self._held: dict[str, LowRank] = {}
        self._beside: tuple[dict[str, LowRank], LowRank | None] = self._held, None  # and their sum

    @property
    def held(self) -> dict[str, LowRank]:
        """The changes that are in force, by name."""
        return self._held

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the dequantized weight."""
        return self.matrix.dtype

    @property
    def is_whole(self) -> bool:
        """Whether it is in memory."""
        return not self.parameter.is_meta

    def bounds(self) -> tuple[float, float]:
        """Fewer terms, since each costs time in every forward pass.

        The error is a sixteenth of what rounding to bfloat16 would make of what was learned.
        """
        return min(self.shape) / 4, 2**-12

    def put(self, wanted: Mapping[str, LowRank], several: bool) -> None:
        """Let these be in force, and nothing else."""
        self._held = dict(wanted)

    def beside(self, like: Tensor) -> LowRank | None:
        """The sum of what is in force, on the device and in the precision of a factor."""
        held, (of, total) = self._held, self._beside  # another thread may put others meanwhile
        if of is not held:
            changes = [change for change in held.values() if change.rank]
            total = sum(changes[1:], changes[0]).joined() if changes else None
        if total is not None:
            total = total.to(like.device, like.dtype)
        self._beside = held, total
        return total

    def add(self, name: str, change: LowRank, now: LowRank) -> bool:
        """False: nothing is to be written."""
        return False

    def present(self) -> Tensor:
        """The weight with the changes that are in force."""
        return self.with_changes(self._held.values())

    def pretrained(self) -> Tensor:
        """The weight, dequantized."""
        return self.matrix.to(self.work_dtype, copy=True)

    def overwritten(self) -> None:
        """Forget all about a weight that is about to be overwritten."""
        self._fingerprint = None
        self.put({}, several=False)

    def look(self) -> None:
        """Nothing is to be found, as in `is_written`."""

    def is_written(self) -> bool:
        """False: what others do to it is theirs, for nothing stands in it."""
        return False

    def is_changed(self) -> bool:
        """False, as `is_written`."""
        return False

    def expects_write(self) -> bool:
        """False: it need not be told of any."""
        return False

    def expect_write(self) -> None:
        """Nothing is to be noted."""

    def arrived(self) -> None:
        """Nothing is to be noted."""

    def let_go(self) -> None:
        """Nothing is held."""

    def moved(self) -> None:
        """Nothing is to be noted."""

    def copied(self) -> None:
        """Nothing is to be noted."""


class RosaQuantizedLinear(RosaLayer):
    """ROSA on a linear layer that bitsandbytes, HQQ or torchao has quantized.

    As QLoRA's, its backward pass goes through the quantized weight, and only the factors learn.
    """

    adapts = "linear layers that bitsandbytes, HQQ or torchao has quantized"
    is_quantized = True
    is_linear = True
    weight_class = QuantizedWeight

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.quantization_backend = backend_of(self.get_base_layer())

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is such a layer."""
        backend = backend_of(module)
        return backend is not None and backend.layer_type == "linear" and backend.supports_merge

    @staticmethod
    def view_of(base: nn.Module, parameter: str) -> MatrixView:
        """The dequantized weight."""
        return QuantizedView(base, "W_q" if "W_q" in base._parameters else parameter)

    @property
    def weight(self) -> Tensor:
        """What is stored, for models that ask for its device or its precision."""
        return self.base_weight.parameter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus ``(O + s B A) x``; (..., in) to (..., out)."""
        active = self._in_use(x, is_traced())
        product = partial(linear_product, self)
        return plain_sum(self, active, product, x, *args, beside=self._held_product, **kwargs)

    def _held_product(self, result: Tensor, x: Tensor) -> Tensor:
        """The base layer's result of x with what is in force beside the weight."""
        like = next(iter(self.rosa_A.values()), result)
        weight = self.base_weight
        assert isinstance(weight, QuantizedWeight)
        beside = weight.beside(like)
        if beside is None:
            return result
        x = self._cast_input_dtype(x, like.dtype)
        return result + F.linear(F.linear(x, beside.A), beside.B)

    def take_config(self, model: nn.Module) -> None:
        """Take how to quantize again from a model of transformers; torchao's weights do not say."""
        config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        how = getattr(config, "get_apply_tensor_subclass", None)
        if how is not None and isinstance(self.quantization_backend, TorchaoBackend):
            self.quantization_backend.get_apply_tensor_subclass = how

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer; with what is merged it is quantized anew, which rounds it."""
        super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        weight = self.base_weight
        if weight.held:
            warnings.warn(
                f"the merged weight of {self.name} is quantized again, which rounds what was "
                "learned: for the exact model keep the adapter, or merge it into the weights as "
                "they were before they were quantized",
                stacklevel=2,
            )
            self.set_base_weight(weight.present().to(weight.stored_dtype))
        return self.get_base_layer()
