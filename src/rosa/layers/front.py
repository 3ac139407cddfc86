"""A module that stands in another's place, and gives and takes attributes as that one would."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from rosa.errors import UserError

_OF_ENGINES = ("_", "ds_", "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")
"""How names begin of what torch, accelerate and DeepSpeed set on every module, for that alone."""


class Front(nn.Module):
    """What models ask of a module that was adapted they find here, with the changed weight.

    Attributes:
        base_layer: the module, or another one in front of it.
        parameter_name: of the weight, in the module.
    """

    base_layer: nn.Module
    parameter_name: str
    is_quantized = False
    _made = False  # whether its own attributes were set, which the module may have too

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with."""
        raise NotImplementedError

    @property
    def weight_path(self) -> str:
        """Where the weight is, from here: one may be around another."""
        path, module = "base_layer.", self.base_layer
        while isinstance(module, Front):
            path, module = f"{path}base_layer.", module.base_layer
        return path + self.parameter_name

    def __getattr__(self, name: str) -> Any:
        """What models ask of a layer beside its weight: a convolution's stride, a method.

        A method of the module's own class computes with the changed weight.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
        found = getattr(self.base_layer, name)
        if _is_method(found) and not self.is_quantized:
            return partial(_call_method, self, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what the module has and this has not where it is looked at: in the module."""
        if self._made and name == self.parameter_name:
            raise UserError(
                f"{name} is adapted: replace it inside model.disable_adapter(), in base_layer"
            )
        modules = self.__dict__.get("_modules", {})
        own = name in self.__dict__ or _takes(type(self), name) or name.startswith(_OF_ENGINES)
        if own or not self._made or name in modules or not hasattr(self.base_layer, name):
            super().__setattr__(name, value)
        else:
            setattr(self.base_layer, name, value)


def _takes(kind: type, name: str) -> bool:
    """Whether instances of a class have such an attribute that can be set; not all can be."""
    found = getattr(kind, name, None)
    return hasattr(kind, name) and not (isinstance(found, property) and found.fset is None)


class _Calling(nn.Module):
    """Calls a method of a module inside it, for `functional_call`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return method(*args, **kwargs)


def _is_method(found: Any) -> bool:
    """Whether it is a method that is bound to a module, or what was made of one for a layer."""
    if isinstance(found, partial):
        return found.func is _call_method
    return isinstance(found, MethodType) and isinstance(found.__self__, nn.Module)


def _call_method(layer: Front, method: Any, *args: Any, **kwargs: Any) -> Any:
    """What a method of a layer's module gives with the changed weight in its place."""
    how = {layer.weight_path: layer.weight}
    return functional_call(
        _Calling(layer.base_layer), how, (method, args, kwargs), tie_weights=False
    )
