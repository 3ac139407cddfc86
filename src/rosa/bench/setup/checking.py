"""What each setting of a run may be."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from rosa.bench import processes
from rosa.bench.setup.fsdp import check_fsdp
from rosa.bench.setup.methods import check_packages, configure, find_method
from rosa.bench.setup.quantizing import check_load_in
from rosa.bench.setup.settings import LOSS_ON, METHOD, ON_NAN, PRECISIONS, RunSettings, convert
from rosa.bench.setup.zero import check_zero
from rosa.bench.tasks.chat import usual_length
from rosa.bench.tasks.templates import check_trl
from rosa.errors import UserError

if TYPE_CHECKING:
    from rosa import RosaCallback

RESAMPLED = ("rosa", "relora")
"""The methods whose subspaces are drawn anew while they train."""
OF_ROSA = ("directions", "trained", "resample_every", "moments", "first_draw")
OF_RELORA = ("resample_every", "moments")
"""Settings that mean something to those alone."""
NOT_RESUMED = {
    "adalora": "its ranks change as it trains, and PEFT loads it with those that it began with",
    "ptuning": "PEFT saves what its prompt encoder gives, and not the encoder",
}
"""Methods of PEFT's whose training cannot be gone on with, and why."""


def check(settings: RunSettings) -> RunSettings:
    """The settings with what depends on another filled in; raises for values of no use."""
    from rosa.checks import check_rank

    settings = _with_options(settings)
    method = find_method(settings.method)
    check_packages(settings.method)
    if method.has_rank:
        settings = replace(settings, rank=8 if settings.rank is None else settings.rank)
        check_rank("rank", settings.rank)
    elif settings.rank is not None:
        raise UserError(f"method {settings.method} has no rank: leave --rank out")
    if settings.alpha is not None and method.config is None:
        raise UserError(f"method {settings.method} has no alpha: leave --alpha out")
    settings = replace(settings, lr=method.lr if settings.lr is None else settings.lr)
    for name in ("lr", "beta", "epochs", "batch_size", "eval_batch_size", "gradient_accumulation"):
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
    longest = usual_length(settings.train) if settings.max_length is None else settings.max_length
    if longest < 8:
        raise UserError(f"max_length must be at least 8 tokens, got {longest}")
    settings = replace(settings, max_length=longest)
    if settings.beta != RunSettings.beta and not settings.preference:
        raise UserError("--beta is of preferences: give --preference, or leave it out")
    if settings.preference:
        _check_preference(settings)
    if settings.packing:
        check_trl("--packing")
        if processes.count() > 1:
            raise UserError("--packing is for one process: leave it out, or run without torchrun")
    for name, allowed in {"loss_on": LOSS_ON, "precision": PRECISIONS, "on_nan": ON_NAN}.items():
        if (value := getattr(settings, name)) not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}: {value}")
    check_zero(settings)
    check_fsdp(settings)
    check_load_in(settings.load_in)
    if settings.load_in != "full" and method.config is None:
        raise UserError(f"method {settings.method} trains the weights: it needs load_in full")
    schedule(settings)
    if settings.method in RESAMPLED or settings.set:
        configure(settings, {}, ())  # checks its own
    return settings


def _check_preference(settings: RunSettings) -> None:
    """Raise UserError for what preferences are not trained with."""
    check_trl("--preference")
    if settings.task is not None:
        raise UserError("--preference is for a --train file of prompt, chosen and rejected")
    if settings.packing or settings.group_by_length:
        raise UserError("--packing and --group-by-length are not for preferences")
    if settings.loss_on != RunSettings.loss_on:
        raise UserError("--loss-on is of chats: of preferences the answers are compared")
    if any(text.startswith("bias=") and text != "bias=none" for text in settings.set):
        raise UserError(
            "--set bias: trained biases stay where the adapter is disabled, which is what DPO "
            "holds the model to: leave it out"
        )
    if settings.method == "lora_ga":
        raise UserError("lora_ga begins with the gradient of a text's loss: not of preferences")


def _with_options(settings: RunSettings) -> RunSettings:
    """With those of `--set` that have options of their own put there, as directions=svd."""
    rest = []
    for text in settings.set:
        name, equals, value = text.partition("=")
        kinds = {f.name: str(f.type) for f in fields(settings) if f.metadata["panel"] == METHOD}
        if name in ("set", "method") or name not in kinds or not equals:
            rest.append(text)
        else:
            check_meant(settings.method, name, f"--set {text}")
            found, before = convert(f"--set {text}", value, kinds[name]), getattr(settings, name)
            if before not in (found, getattr(RunSettings, name)):
                raise UserError(f"--set {text} and {name} {before} contradict each other: give one")
            settings = replace(settings, **{name: found})
    return replace(settings, set=tuple(rest))


def check_meant(method: str, setting: str, given: str) -> None:
    """Raise UserError if a setting that is given to one method means nothing to it."""
    means = {"rosa": OF_ROSA, "relora": OF_RELORA}.get(method, ())
    if setting in OF_ROSA and setting not in means:
        raise UserError(
            f"{given}: {setting} is ROSA's, and means nothing to method {method}: leave it out"
        )


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
