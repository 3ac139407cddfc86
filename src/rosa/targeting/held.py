"""Modules that a model holds in ways that torch does not know of, and PEFT does not replace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from rosa.errors import UserError

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
