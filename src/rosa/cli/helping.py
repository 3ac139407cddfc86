"""Help that fits a screen: everyday options by `--help`, all of them by `--help-all`.

A wrong value is told with the file that it is from, if it is from one.
"""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand

from rosa.errors import UserError

ALL = "--help-all"
FILES = ("train", "validation", "test")
"""Options of which the last would count, as of any, where the rows of all are meant."""
FILE = "rosa.file"
"""Where a command's context keeps the path of the file that gives defaults of its options."""


class Command(TyperCommand):
    """A command whose hidden options, and every option's type, are shown by `--help-all`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        paragraphs = re.split(r"\n\s*\n", self.help or "")
        self.help = "\n\n".join(" ".join(each.split()) for each in paragraphs)  # wrapped anew

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As every command's; `--help-all` shows all help, and that is all."""
        if ALL in args:
            for parameter in self.params:
                parameter.hidden = False  # type: ignore[attr-defined]  # arguments too
            typer.echo(super().get_help(ctx))
            ctx.exit()
        for parameter in self.params:
            named = parameter.opts if parameter.name in FILES else ()
            if sum(arg.partition("=")[0] in named for arg in args) > 1:
                raise UserError(
                    f"{parameter.opts[0]} was given more than once, and takes one file: put the "
                    "rows into one"
                )
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            name = error.param and error.param.name
            source = ctx.get_parameter_source(name) if name else None
            if source is None or source.name != "DEFAULT_MAP":
                raise
            raise UserError(f"{ctx.meta[FILE]}: {name}: {error.message}") from error

    def get_help(self, ctx: Any) -> str:
        """The help for every day: a line or two an option, with its default and without its type.

        Nothing else comes of a command whose help was asked for, so its options may change.
        """
        hidden = [each for each in self.params if getattr(each, "hidden", False)]
        more = f"{len(hidden)} more options and " if hidden else ""
        self.epilog = f"{ALL} shows {more}the types."
        for parameter in self.params:
            parameter.display_type_rich = lambda ctx: None  # type: ignore[attr-defined]
            if parameter.param_type_name == "option":
                _say_default(parameter)
        self.add_help_option = False
        return super().get_help(ctx)


def _say_default(parameter: Any) -> None:
    """In the help itself, where it takes no line of its own."""
    default = parameter.default
    if isinstance(default, (list, tuple)):
        default = " ".join(map(str, default))
    told = not callable(default) and default not in (None, "") and default is not False
    said = "required" if parameter.required else f"default: {default}" if told else ""
    if said:
        parameter.help = f"{parameter.help} ({said})"
    parameter.required = parameter.show_default = False
