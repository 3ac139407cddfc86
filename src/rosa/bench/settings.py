"""Every setting of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

PRECISIONS = ("auto", "fp32", "bf16")


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


def in_bf16(settings: RunSettings) -> bool:
    """Whether the run computes in bfloat16: as asked, or where a GPU has it."""
    import torch

    if settings.precision != "auto":
        return settings.precision == "bf16"
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
