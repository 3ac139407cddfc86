"""What can be trained and compared: one table, each row a name and how PEFT builds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig

    from rosa.training import RunSettings


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        about: what it is, in a line.
        lr: the default learning rate; a starting point, tune it for your data.
        config: the PEFT config from a run's settings and the arguments that all methods share
            (`target_modules`, `task_type`); None if the method needs no adapter.
        has_rank: whether `--rank` means anything to it.
    """

    about: str
    lr: float
    config: Callable[[RunSettings, dict[str, Any]], PeftConfig] | None = None
    has_rank: bool = False


def _rosa(settings: RunSettings, shared: dict[str, Any]) -> PeftConfig:
    from rosa import RosaConfig

    return RosaConfig(
        r=settings.rank,
        alpha=settings.alpha,
        directions=settings.directions,
        triplets=settings.triplets,
        split=settings.split,
        seed=settings.seed,
        **shared,
    )


def _lora(settings: RunSettings, shared: dict[str, Any]) -> PeftConfig:
    from peft import LoraConfig

    # The common choice of alpha: a scale of 2.
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    return LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=0.0, **shared)  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "rosa": Method("random subspaces of the weights, drawn anew as it trains", 1e-3, _rosa, True),
    "lora": Method("one low-rank product beside each weight (alpha 2r)", 1e-3, _lora, True),
    "full": Method("every weight of the model", 5e-5),
    "head": Method("the new head only, on the frozen pretrained model", 1e-3),
}


def find_method(name: str) -> Method:
    """The row of that name; ValueError lists what there is."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
