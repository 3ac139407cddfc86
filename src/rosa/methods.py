"""What can be trained and compared: one table, each row a name and how PEFT builds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rosa.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

    from rosa.settings import RunSettings


TOKENS = 20
"""Trained tokens before every text, of the methods that have such."""

Config = Callable[["RunSettings", int, dict[str, Any]], "PeftConfig"]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        about: what it is, in a line.
        lr: the default learning rate; a starting point, tune it for your data.
        config: the PEFT config from a run's settings, the rank and the arguments that all methods
            share (`target_modules`, `task_type`); None if the method needs no adapter.
        has_rank: whether `--rank` means anything to it.
        virtual_tokens: places of the model's input that it takes for itself.
    """

    about: str
    lr: float
    config: Config | None = None
    has_rank: bool = False
    virtual_tokens: int = 0


def _rosa(settings: RunSettings, rank: int, shared: dict[str, Any]) -> PeftConfig:
    from rosa import RosaConfig

    return RosaConfig(
        r=rank,
        alpha=settings.alpha,
        directions=settings.directions,
        side=settings.side,
        seed=settings.seed,
        **shared,
    )


def _relora(settings: RunSettings, rank: int, shared: dict[str, Any]) -> PeftConfig:
    from rosa import RosaConfig

    alpha = 2 * rank if settings.alpha is None else settings.alpha
    return RosaConfig(r=rank, alpha=alpha, directions="zero", seed=settings.seed, **shared)


def _lora(**options: Any) -> Config:
    """PEFT's LoRA with options that make it one of its variants."""

    def config(settings: RunSettings, rank: int, shared: dict[str, Any]) -> PeftConfig:
        from peft import LoraConfig

        # The common choice of alpha: a scale of 2. PiSSA and OLoRA start from the weight itself,
        # at a scale of 1, as in their papers.
        usual = rank if "init_lora_weights" in options else 2 * rank
        alpha = usual if settings.alpha is None else settings.alpha
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float works too
            lora_dropout=0.0,
            **options,
            **shared,
        )

    return config


def _lora_ga(settings: RunSettings, rank: int, shared: dict[str, Any]) -> PeftConfig:
    from peft import LoraConfig, LoraGAConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if settings.alpha is None else settings.alpha,  # type: ignore[arg-type]
        init_lora_weights="lora_ga",  # type: ignore[arg-type]  # its annotation lacks it
        lora_ga_config=LoraGAConfig(),
        **shared,
    )


def _adalora(settings: RunSettings, rank: int, shared: dict[str, Any]) -> PeftConfig:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        target_r=rank,
        init_r=math.ceil(1.5 * rank),
        lora_alpha=2 * rank if settings.alpha is None else settings.alpha,  # type: ignore[arg-type]
        total_step=1,  # set when the number of steps is known; see training.py
        **shared,
    )


def _ia3(settings: RunSettings, rank: int, shared: dict[str, Any]) -> PeftConfig:
    from peft import IA3Config

    # It scales activations of modules of its own choice, by architecture.
    return IA3Config(**{**shared, "target_modules": None})


def _prompt(kind: str) -> Config:
    def config(settings: RunSettings, rank: int, shared: dict[str, Any]) -> PeftConfig:
        import peft

        if shared.get("modules_to_save"):
            raise UserError(
                f"method {settings.method} cannot train and save the modules that the checkpoint "
                f"lacks ({', '.join(shared['modules_to_save'])}): choose another method or model"
            )
        return getattr(peft, kind)(num_virtual_tokens=TOKENS, task_type=shared.get("task_type"))

    return config


METHODS: dict[str, Method] = {
    "rosa": Method("random subspaces of the weights, drawn anew as it trains", 1e-3, _rosa, True),
    "lora": Method("one low-rank product beside each weight (alpha 2r)", 1e-3, _lora(), True),
    "rslora": Method("LoRA scaled by alpha / sqrt(r)", 1e-3, _lora(use_rslora=True), True),
    "dora": Method("LoRA with a magnitude of its own a row", 1e-3, _lora(use_dora=True), True),
    "pissa": Method(
        "LoRA started at the top singular triplets", 1e-3, _lora(init_lora_weights="pissa"), True
    ),
    "olora": Method(
        "LoRA started at a QR of the weight", 1e-3, _lora(init_lora_weights="olora"), True
    ),
    "lora_ga": Method("LoRA started at the loss gradient's triplets", 1e-3, _lora_ga, True),
    "adalora": Method("LoRA with ranks that move between layers", 1e-3, _adalora, True),
    "relora": Method("LoRA merged and started again at zero as it trains", 1e-3, _relora, True),
    "ia3": Method("a scale on keys, values and hidden activations", 1e-2, _ia3),
    "prompt": Method(
        f"{TOKENS} trained tokens before the text",
        1e-2,
        _prompt("PromptTuningConfig"),
        virtual_tokens=TOKENS,
    ),
    "ptuning": Method(
        f"{TOKENS} tokens from a small network",
        1e-3,
        _prompt("PromptEncoderConfig"),
        virtual_tokens=TOKENS,
    ),
    "prefix": Method(
        f"{TOKENS} trained keys and values a layer",
        1e-2,
        _prompt("PrefixTuningConfig"),
        virtual_tokens=TOKENS,
    ),
    "full": Method("every weight of the model", 5e-5),
    "head": Method("the new head only, on the frozen pretrained model", 1e-3),
}


def find_method(name: str) -> Method:
    """The row of that name; ValueError lists what there is."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
