"""The command line's options for the settings of a run: made of the fields of `RunSettings`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from rosa.bench.setup.launched import as_launched
from rosa.bench.setup.methods import METHODS
from rosa.bench.setup.settings import RunSettings
from rosa.bench.tasks import TASKS

OPTIONS = {f.metadata["option"] or f.name: f for f in fields(RunSettings)}
"""The settings by the names of their options."""


def option(panel: str, text: str, *names: str, everyday: bool = True) -> typer.models.OptionInfo:
    """An option of one command, for `Annotated`; what is not for every day is in --help-all."""
    return typer.Option(*names, help=text, rich_help_panel=panel, hidden=not everyday)


def takes(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of these names; it gets what was given as keyword arguments.

    Those without a default come before the command's own options, the others after them.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [_parameter(name) for name in names]
        required = [p for p in added if p.default is p.empty]
        optional = [p for p in added if p.default is not p.empty]
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]  # typer reads it
            parameters=[p.replace(kind=p.KEYWORD_ONLY) for p in (*required, *own, *optional)]
        )
        return command

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    found = OPTIONS[name]
    panel, everyday = found.metadata["panel"], found.metadata["everyday"]
    text = found.metadata["help"].format(methods=some(METHODS), tasks=some(TASKS))
    kind = get_type_hints(RunSettings, localns={"Path": Path})[found.name]
    default = inspect.Parameter.empty if found.default is MISSING else found.default
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []  # without a --no-...
    if isinstance(default, tuple):
        kind, default = list[str], list(default)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option(panel, text, *names, everyday=everyday)],
    )


def some(names: Mapping[str, Any]) -> str:
    """The first few of many names; the error of a name that is none lists them all."""
    return f"{', '.join([*names][:2])}, ... (? lists {len(names)})"


def settings_of(given: dict[str, Any]) -> RunSettings:
    """The settings of a run from what a command was given, and its launcher."""
    values = {OPTIONS[name].name: value for name, value in given.items()}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return as_launched(RunSettings(**{**values, **lists}))
