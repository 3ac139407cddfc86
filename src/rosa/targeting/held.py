"""Modules that are held where PEFT does not replace them: by their model, or by anyone else."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from rosa.errors import UserError
from rosa.pretrained.holders import references, references_to_itself

_DEEP = 3
"""Lists in lists, at most."""
_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has: its registered modules, its hooks."""


def check_not_held(model: nn.Module, targets: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise UserError where modules to adapt are in lists, dicts or unregistered attributes.

    What the model calls there would be the module alone, with the offset in its weight and without
    the factors' product.

    Args:
        model: that is searched.
        targets: the modules with their names.
    """
    held = held_elsewhere(model, targets)
    if held:
        name, place = next(iter(held.items()))
        raise UserError(
            f"{name} is held by {place} too, in a list, a dict or an attribute that torch does not "
            "look into: called by that it would be the pretrained module with ROSA's offset in its "
            "weight and nothing else. Hold it in an nn.ModuleList or nn.ModuleDict there, or leave "
            f"out what is held so: exclude_modules={sorted(held)}"
        )


def held_elsewhere(model: nn.Module, targets: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Names of modules that are in lists, dicts or unregistered attributes, and where they are."""
    wanted = {id(module): name for name, module in targets}
    return {
        wanted[id(found)]: f"{owner}.{attribute}".lstrip(".")
        for owner, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _OWN
        for found in _modules_in(value, _DEEP)
        if id(found) in wanted
    }


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, dict | list | tuple | set):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(each, depth - 1)


def held_outside(model: nn.Module) -> set[str]:
    """Names of modules that someone outside of their model holds: another model, a list, a name.

    To be called before anyone who works on the model holds some: references are counted.
    """
    places = [
        (f"{name}.{child}".lstrip("."), module._modules, child)
        for name, module in model.named_modules()
        for child in module._modules
    ]
    inside = Counter(id(modules[child]) for _, modules, child in places)
    usual = references(nn.Sequential(nn.Identity())._modules, "0") - 1
    return {
        name
        for name, modules, child in places
        if modules[child] is not None
        if (more := references(modules, child) - usual - inside[id(modules[child])]) > 0
        if more > references_to_itself(modules[child])
    }


def give_own(model: nn.Module, name: str) -> nn.Module | None:
    """Put a copy of a module in its place in the model: the same tensors, hooks and modules inside.

    Whoever else holds the module holds another one then, as they would beside PEFT's LoRA, which
    leaves a module as it is.

    Returns:
        the copy; None for one that holds itself, in a forward or a hook that was put on it.
    """
    parent, _, child = name.rpartition(".")
    places, module = model.get_submodule(parent)._modules, model.get_submodule(name)
    if references_to_itself(module):
        warnings.warn(
            f"{name} is held outside of the model too, and has a forward or a hook that holds it: "
            "called from there it is the module with ROSA's offset in its weight and nothing else",
            stacklevel=2,
        )
        return None
    own = copy.copy(module)
    for each in ("_parameters", "_buffers", "_modules"):  # and hooks put on one are on both
        vars(own)[each] = vars(module)[each].copy()
    places[child] = own
    return own
