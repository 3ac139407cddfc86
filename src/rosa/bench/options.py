"""The command line's options for the settings of a run: each is declared once, for every command.

An option has the name, the type and the default of a field of `RunSettings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from rosa.bench.methods import METHODS
from rosa.bench.settings import RunSettings
from rosa.bench.tasks import TASKS
from rosa.config import MOMENTS

DATA, METHOD, TRAINING, OUTPUT = "Data", "Method", "Training", "Output"


class Option(NamedTuple):
    """In which panel of the help an option stands, what it says, and its field if not its name."""

    panel: str
    text: str
    field: str | None = None


OPTIONS = {
    "model": Option(DATA, "Pretrained model: a hub id or a folder."),
    "output": Option(OUTPUT, "Folder for what is trained, its metrics and its settings."),
    "train": Option(DATA, "Training file: .csv, .tsv, .jsonl, or .txt for a decoder."),
    "validation": Option(DATA, "Validation file; else a tenth is split off the training data."),
    "task": Option(DATA, f"A task by name: {', '.join(TASKS)}."),
    "data": Option(DATA, "Folder of the task's own files."),
    "text_column": Option(DATA, "Column of the text; give it twice for pairs.", "text_columns"),
    "label_column": Option(DATA, "Column of the label."),
    "limit_train": Option(DATA, "Train on this many examples, drawn by the seed."),
    "limit_test": Option(DATA, "Report on the first so many test examples."),
    "hold_out": Option(
        DATA, "Validate on a tenth of the training data; report the task's own set as test."
    ),
    "max_length": Option(DATA, "Longest text in tokens; the rest is cut."),
    "group_by_length": Option(DATA, "Batches of texts of like length: less padding, faster."),
    "method": Option(METHOD, f"What trains: {', '.join(METHODS)}."),
    "rank": Option(METHOD, "Rank of the trained subspaces, or of LoRA's kin. [default: 8]"),
    "alpha": Option(METHOD, "Scale is alpha / rank; default: rank (LoRA: 2 rank)."),
    "directions": Option(
        METHOD,
        "ROSA: svd (singular triplets), orthonormal (random), gradient (where the loss falls) or "
        "zero.",
    ),
    "side": Option(
        METHOD, "ROSA by the gradient: of the outputs' side (left), the inputs' (right), both."
    ),
    "resample_every": Option(
        METHOD, "ROSA: draw new subspaces every: auto, epoch, never, 200 (steps), 0.5epochs."
    ),
    "moments": Option(METHOD, f"ROSA: the optimizer's, at a resample: {', '.join(MOMENTS)}."),
    "first_draw": Option(
        METHOD,
        "ROSA: step of the first draw by the gradient; default: 32, or a tenth of a shorter "
        "training.",
    ),
    "target_modules": Option(
        METHOD, "Layers to adapt: attention, all-linear, or names (repeat the option)."
    ),
    "lr": Option(TRAINING, "Peak learning rate; default: the method's own (rosa 1e-3). Tune it."),
    "epochs": Option(TRAINING, "Passes over the training data."),
    "steps": Option(TRAINING, "Optimizer steps, in place of epochs; ten evaluations."),
    "batch_size": Option(TRAINING, "Examples per device and step."),
    "eval_batch_size": Option(TRAINING, "Examples per step of evaluation."),
    "gradient_accumulation": Option(TRAINING, "Batches per optimizer step."),
    "weight_decay": Option(
        TRAINING, "AdamW's; ROSA's factors decay toward what they were drawn as."
    ),
    "warmup": Option(TRAINING, "Share of the steps with rising rate."),
    "precision": Option(TRAINING, "auto (bf16 where a GPU has it), fp32 or bf16."),
    "seed": Option(TRAINING, "Seed of everything random."),
    "report_to": Option(OUTPUT, "Trackers as in Trainer: none, tensorboard, wandb, ..."),
    "record_changes": Option(OUTPUT, "Record the rank of the weights' change every epoch."),
}


def option(panel: str, text: str, *names: str) -> typer.models.OptionInfo:
    """An option of one command, for `Annotated`."""
    return typer.Option(*names, help=text, rich_help_panel=panel)


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
    panel, text, field = OPTIONS[name]
    (found,) = (f for f in fields(RunSettings) if f.name == (field or name))
    kind = get_type_hints(RunSettings, localns={"Path": Path})[found.name]
    default = inspect.Parameter.empty if found.default is MISSING else found.default
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []  # without a --no-...
    if isinstance(default, tuple):
        kind, default = list[str], list(default)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option(panel, text, *names)],
    )


def settings_of(given: dict[str, Any]) -> RunSettings:
    """The settings of a run from what a command was given."""
    values = {OPTIONS[name].field or name: value for name, value in given.items()}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return RunSettings(**{**values, **lists})
