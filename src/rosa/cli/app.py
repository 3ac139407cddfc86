"""The command line's frame: what all commands hang on, and options that several have."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from rosa.bench import processes
from rosa.bench.setup.options import option
from rosa.bench.setup.settings import OUTPUT
from rosa.cli.helping import Command
from rosa.errors import UserError

app = typer.Typer(
    name="rosa",
    help="Fine-tune pretrained models with ROSA: LoRA's memory, a change of any rank, and a plain "
    "model at the end.",
    no_args_is_help=True,
    epilog="With --debug after any command, an error shows where it came from.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
command = partial(app.command, cls=Command)
PushToHub = Annotated[
    str | None,
    typer.Option(
        help="Push it to this repository of the Hugging Face hub, as me/name.",
        rich_help_panel=OUTPUT,
    ),
]
Private = Annotated[
    bool,
    option(OUTPUT, "Let only you see a repository that is made.", "--private", everyday=False),
]


@app.callback()
def _check_processes(context: typer.Context) -> None:
    if processes.count() > 1 and context.invoked_subcommand not in ("train", "evaluate"):
        raise UserError(
            f"rosa {context.invoked_subcommand} is for one process: run it without torchrun (of "
            "the commands, train and evaluate run in several)"
        )
