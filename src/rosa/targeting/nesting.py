"""Adapted modules inside modules with adapted parameters, and inside those that are trained whole.

PEFT puts a wrapper around a module of which it adapts a parameter: what lies inside has another
name from then on, which no config and no file knows.
"""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.kinds.parameter import ParamWrapper
from rosa.kinds.registry import kind_of
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import base_of, plain_name
from rosa.targeting.matching import is_target, is_trained_in_full, names_parameter


def check_nesting(config: RosaConfig, model: nn.Module) -> None:
    """Raise ValueError where one lies inside another, before anything is changed."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            _check_inside_trained(config, name, module)
        elif isinstance(module, RosaLayer):
            _check_inside_adapted(config, name, module)
    if config.target_parameters:
        for name, module in model.named_modules():
            if name and any(_names_parameter(config, name, p) for p in module._parameters):
                _check_around(config, name, module)


def _names_parameter(config: RosaConfig, module: str, parameter: str) -> bool:
    return names_parameter(config.target_parameters or (), f"{plain_name(module)}.{parameter}")


def _inside(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside one, by the names that they have in a plain model."""
    bare = plain_name(name)
    for child, inner in module.named_modules():
        yield f"{bare}.{child}" if child else bare, inner


def _check_inside_trained(config: RosaConfig, name: str, wrapper: AuxiliaryTrainingWrapper) -> None:
    for inner, module in _inside(name, wrapper.original_module):
        own = inner.replace(name, f"{name}.original_module", 1)  # as "all-linear" finds it
        named = kind_of(module) and (is_target(config, inner) or is_target(config, own))
        if named or any(_names_parameter(config, inner, p) for p in module._parameters):
            raise UserError(
                f"{inner} is trained by another adapter (modules_to_save, "
                "trainable_token_indices) or lies in a module that is, and this one would adapt "
                "it: give both the same of these, or leave it out with exclude_modules"
            )


def _check_inside_adapted(config: RosaConfig, name: str, layer: RosaLayer) -> None:
    base = layer.get_base_layer()
    if type(layer) is not ParamWrapper and is_target(config, plain_name(name)):
        return  # what it holds goes with it
    for inner, module in _inside(name, base):
        full = is_trained_in_full(config, inner)
        if module is not base and (full or (kind_of(base_of(module)) and is_target(config, inner))):
            raise UserError(
                f"{inner} lies in {plain_name(name)}, which another adapter adapts "
                f"({layer.parameter_name}), so that it has another name in this model: name the "
                "same target_modules and target_parameters for both adapters, or leave it out"
            )


def _check_around(config: RosaConfig, name: str, holder: nn.Module) -> None:
    for inner, module in _inside(name, holder):
        if is_trained_in_full(config, inner):
            raise UserError(
                f"{inner} would be trained in full (modules_to_save, or the head of task_type="
                f"{config.task_type}), and target_parameters names a parameter of {name}: leave "
                "one of them out"
            )
        adapted = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if module is not holder and (adapted or (kind_of(module) and is_target(config, inner))):
            raise UserError(
                f"{inner} is adapted, and lies in {name}, of which target_parameters names a "
                "parameter: PEFT would put that one's wrapper around both. Adapt the module's "
                "parameters by their names alone (target_parameters), or leave them out"
            )
