"""A module that stands in another's place, and gives and takes attributes as that one would."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import Variable
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from rosa.errors import UserError
from rosa.layers.tracing import is_traced
from rosa.pretrained.weight import WRITING

_OF_ENGINES = ("_", "ds_", "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")
"""How names begin of what torch, accelerate and DeepSpeed set on every module, for that alone."""


class Front(nn.Module, BaseTunerLayer):
    """What models ask of a module that was adapted they find here, with the changed weight.

    Attributes:
        base_layer: the module, or another one in front of it.
        parameter_name: of the weight, in the module.
    """

    base_layer: nn.Module
    parameter_name: str
    is_quantized = False
    has_stand_in = False  # whether its module holds the changed weight, for a backward pass
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
    given, module = (method, args, kwargs), _Calling(layer.base_layer)
    with in_turn():
        return call_with(layer, layer.weight, layer.weight_path, module, given, {})


def in_turn() -> AbstractContextManager[Any]:
    """While the weight in the module is this thread's: see `WRITING`. Traces have no threads."""
    return nullcontext() if is_traced() else WRITING


def check_seen(layer: Front) -> None:
    """Raise UserError if the module finds another tensor before its parameter of the name."""
    base, name = layer.get_base_layer(), layer.parameter_name
    if name in vars(base) and name in base._parameters and not layer.has_stand_in:
        raise UserError(
            f"{type(base).__name__} finds another tensor before its own {name}, as FSDP 1 puts one "
            "there for a pass, and would not see what ROSA changes: use FSDP 2 (fully_shard), or "
            "leave the layer out with exclude_modules"
        )


def forget_stand_in(layer: Front) -> None:
    """Take the changed weight out of the module that a backward pass has left it in.

    One that comes here again has, and one that failed; see `call_with`.
    """
    if layer.has_stand_in:
        layer.has_stand_in = False
        vars(layer.get_base_layer()).pop(layer.parameter_name, None)


def call_with(
    layer: Front,
    weight: Tensor,
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What a module gives with a changed weight in the place of its own.

    A checkpoint inside computes a part of that anew in the backward pass, when the pretrained
    weight is in its place again. So the gradient of an output brings the changed one for that pass.

    Args:
        layer: whose weight it is.
        weight: W_0 + O + s B A.
        path: where it stands in the module.
        module: what is called.
        args: with these.
        kwargs: and those by name.
    """
    forget_stand_in(layer)
    name, inside = layer.parameter_name, vars(layer.get_base_layer())
    found = functional_call(module, {path: weight}, args, kwargs, tie_weights=False)
    if is_traced() or not weight.requires_grad:
        return found

    def bring(_: Tensor) -> None:
        stand_in = weight.detach().requires_grad_()
        stand_in.register_hook(pass_on)  # a pass of its own, which may come here several times
        layer.has_stand_in = True
        inside[name] = stand_in  # it is found before the parameter
        Variable._execution_engine.queue_callback(partial(forget_stand_in, layer))

    def pass_on(gradient: Tensor) -> None:
        with torch.enable_grad():
            torch.autograd.backward(layer.weight, gradient)

    for each in tree_leaves(found):
        if isinstance(each, Tensor) and each.requires_grad:
            each.register_hook(bring)
    return found
