"""The adapted linear layer: `nn.Linear`, or transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosa.algebra.sketch import Watch
from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.layers import statedict
from rosa.layers.base import RosaLayer
from rosa.layers.effective import effective_weight
from rosa.layers.fused import adapted_linear, can_fuse
from rosa.layers.tracing import is_traced
from rosa.layers.versions import Unchanged, Versions


class RosaLinear(nn.Module, RosaLayer):
    """ROSA on `nn.Linear` or on transformers' `Conv1D` (a linear layer stored transposed)."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: RosaConfig,
        r: int,
        alpha: float | None,
        name: str,
        fingerprint: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        RosaLayer.__init__(self, base_layer, name, fingerprint)
        self._active_adapter = adapter_name
        self.register_state_dict_post_hook(statedict.after_save)
        self.register_load_state_dict_pre_hook(statedict.before_load)
        self.register_load_state_dict_post_hook(statedict.after_load)
        self.update_layer(adapter_name, r, alpha, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus ``s B A x`` per active adapter; (..., in) to (..., out)."""
        traced = is_traced()
        if self.arrived is not None or (not traced and self.is_written()):
            self.synchronize()
        if not traced and not self.was_called:
            self.was_called = True
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.rosa_A]
        for name in active:
            # Torch would compute with whatever lies in memory.
            if self.rosa_A[name].is_meta and not x.is_meta:
                raise UserError(
                    f"the factors of layer {self.name} are not in memory: load the adapter's file "
                    "first (low_cpu_mem_usage), or use the model without offloading (device_map)"
                )
        if len(active) == 1 and not args and not kwargs and not traced:
            (name,) = active
            a, b, dropout = self.rosa_A[name], self.rosa_B[name], self.rosa_dropout[name]
            if isinstance(dropout, nn.Identity) and can_fuse(self.base_layer, x, a):
                sketch = self._sketches.get(name)
                return adapted_linear(self.base_layer, x, a, b, self.scaling[name], sketch)
        result = self._plainly(x, active, *args, **kwargs)
        if result.requires_grad and not traced:
            if x.requires_grad and any(self._standing().values()):
                result = Unchanged.apply(result, self.parameter)
            for name in active:
                if name in self._sketches:
                    result = Watch.apply(result, x, self._sketches[name])
        return result

    def _plainly(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in active:
            a, b, scaling = self.rosa_A[name], self.rosa_B[name], self.scaling[name]
            hidden = F.linear(self.rosa_dropout[name](self._cast_input_dtype(x, a.dtype)), a)
            if scaling != 1.0:
                hidden = hidden * scaling  # on r numbers a token, not on the layer's whole output
            result = result + F.linear(hidden, b)
        return result.to(dtype)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, W_0 + O + s B A, for models that read it.

        In the base weight's own shape; gradients reach the factors.
        """
        self.settle()
        weight = self.parameter
        if self._disable_adapters or self.merged:
            return weight
        for name in self.active_adapters:
            if name in self.rosa_A and not self.rosa_A[name].is_meta:
                a, b, sketch = self.rosa_A[name], self.rosa_B[name], self._sketches.get(name)
                how = self.scaling[name], self.fan_in_fan_out
                weight = effective_weight(weight, a, b, *how, sketch, self._note_read)
        return weight

    def _note_read(self) -> None:
        self.was_read = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer; a cast is of the pretrained weight, with nothing else in it."""
        parameter, standing = self.parameter, self._standing()
        dtype = fn(parameter.detach().new_empty(0)).dtype
        if dtype == parameter.dtype or self.arrived is not None:
            super()._apply(fn, recurse)
            self._versions.arrived(self.parameter, standing)
            return self
        merged = {name: entry.merged for name, entry in self.rosa_offset.entries.items()}
        self.bare()
        try:
            super()._apply(fn, recurse)
        finally:
            self._versions = Versions()
            back = {}
            for name, entry in self.rosa_offset.entries.items():
                own = standing[name] is entry.terms
                entry.terms = entry.terms.to(dtype=self._work_dtype())
                change = standing[name]
                if change is not None:
                    change = entry.terms if own else change.to(dtype=self._work_dtype())
                back[name], entry.merged = change, merged[name]
            with torch.no_grad():
                self._put(back)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy (deepcopy, pickle): its weight is another tensor, with a count of its own."""
        super().__setstate__(state)
        self._versions.copied(self.parameter, self._standing())

    def __repr__(self) -> str:
        return "rosa." + super().__repr__()


def rosa_layers(model: nn.Module) -> Iterator[tuple[str, RosaLinear]]:
    """The adapted layers of a model with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, RosaLinear):
            yield name, module


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, RosaLinear]:
    """The layers that an adapter is in, by their names in a state dict."""
    # The keys of a state dict do not have the prefix of an FSDP wrapper, the modules' names do.
    return {
        name.removeprefix("_fsdp_wrapped_module."): layer
        for name, layer in rosa_layers(model)
        if adapter_name in layer.rosa_offset
    }
