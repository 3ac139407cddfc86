"""Every setting of a run, and what each may be."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.bench.methods import check_packages, find_method
from rosa.errors import UserError

if TYPE_CHECKING:
    from rosa.resampling.callback import RosaCallback

PRECISIONS = ("auto", "fp32", "bf16")
RESAMPLED = ("rosa", "relora")
"""The methods whose subspaces are drawn anew while they train."""


@dataclass(frozen=True)
class RunSettings:
    """Every setting of a run, each with its default; saved as settings.json.

    `lr` None takes the method's own. `resample_every` is "auto" (see `RosaCallback`), "epoch",
    "never", a number of optimizer steps, or epochs as in "0.5epochs". `target_modules` is
    "attention" (the paper's choice: the projections of attention), "all-linear", or names. `warmup`
    is a share of all steps. `rank` None takes 8 where the method has a rank. `steps` counts
    optimizer steps, and takes the place of `epochs`. For `moments` see `rosa.resample`; for
    `first_draw` see `first` of `RosaCallback`; for what a draw takes see `RosaConfig`.
    """

    model: str
    output: Path
    method: str = "rosa"
    task: str | None = None
    data: Path | None = None
    train: Path | None = None
    validation: Path | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    limit_train: int | None = None
    limit_test: int | None = None
    hold_out: bool = False
    rank: int | None = None
    alpha: float | None = None
    directions: str = "gradient"
    side: str = "left"
    resample_every: str = "auto"
    moments: str = "clear"
    first_draw: int | None = None
    target_modules: tuple[str, ...] = ("attention",)
    lr: float | None = None
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int = 64
    gradient_accumulation: int = 1
    weight_decay: float = 0.0
    warmup: float = 0.06
    max_length: int = 128
    group_by_length: bool = False
    precision: str = "auto"
    seed: int = 0
    report_to: str = "none"
    record_changes: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the versions of the libraries."""
        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }
        lists = {name: list(v) for name, v in values.items() if isinstance(v, tuple)}
        names = ("rosa-finetune", "peft", "transformers", "torch", "datasets")
        return {**values, **lists, "versions": {name: version(name) for name in names}}


def check(settings: RunSettings) -> RunSettings:
    """The settings with the method's learning rate filled in; raises for values of no use."""
    from rosa.config import check_rank

    method = find_method(settings.method)
    check_packages(settings.method)
    if method.has_rank:
        settings = replace(settings, rank=8 if settings.rank is None else settings.rank)
        check_rank("rank", settings.rank)
    elif settings.rank is not None:
        raise UserError(f"method {settings.method} has no rank: leave --rank out")
    settings = replace(settings, lr=method.lr if settings.lr is None else settings.lr)
    for name in ("lr", "epochs", "batch_size", "eval_batch_size", "gradient_accumulation"):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive, got {value}")
    if settings.steps is not None and settings.steps < 1:
        raise UserError(f"steps must be at least 1, got {settings.steps}")
    if not 0 <= settings.warmup < 1:
        raise UserError(
            f"warmup is a share of all steps, at least 0 and below 1: {settings.warmup}"
        )
    if not settings.weight_decay >= 0:
        raise UserError(f"weight_decay must not be negative, got {settings.weight_decay}")
    if settings.weight_decay and method.optim:  # transformers gives it none
        raise UserError(
            f"the optimizer of method {settings.method} has no weight decay: leave it 0"
        )
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"seed must be from 0 to 2**32 - 1, got {settings.seed}")
    if settings.max_length < 8:
        raise UserError(f"max_length must be at least 8 tokens, got {settings.max_length}")
    if settings.precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}: {settings.precision}")
    schedule(settings)
    if settings.method in RESAMPLED:
        method.config(settings, settings.rank, {}, ())  # type: ignore[misc]  # checks its own
    return settings


def schedule(settings: RunSettings) -> RosaCallback:
    """When and how the run draws new subspaces; raises for settings of no use."""
    from rosa import RosaCallback

    return RosaCallback(
        parse_period(settings.resample_every),
        moments=settings.moments,
        first=settings.first_draw,
    )


def parse_period(every: str) -> str | int | float:
    """What `RosaCallback` takes, from "auto", "epoch", "never", "100" (steps) or "0.5epochs"."""
    if every in ("auto", "epoch", "never"):
        return every
    number, kind = (every[:-6], float) if every.endswith("epochs") else (every, int)
    try:
        period = kind(number)
    except ValueError:
        period = 0
    if not 0 < period < math.inf:
        raise UserError(
            f"resample_every must be auto, epoch, never, a number of steps such as 200, or epochs "
            f"such as 0.5epochs; got {every!r}"
        )
    return period


def in_bf16(settings: RunSettings) -> bool:
    """Whether the run computes in bfloat16: as asked, or where a GPU has it."""
    import torch

    if settings.precision != "auto":
        return settings.precision == "bf16"
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
