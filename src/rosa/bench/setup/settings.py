"""Every setting of a run: its name, type, default and help, for the command line too."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rosa.config import MOMENTS, RosaConfig
from rosa.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16")
ON_NAN = ("stop", "skip")
LOSS_ON = ("answers", "all")
DATA, METHOD, TRAINING, OUTPUT, PLAN = "Data", "Method", "Training", "Output", "Machine"


def _is(
    panel: str,
    text: str,
    default: Any = MISSING,
    option: str | None = None,
    everyday: bool = False,
) -> Any:
    """A setting: the panel of the help, what it says, and the option's name if another one.

    In the text, {methods} and {tasks} stand for the names that there are. What is not for every day
    is in --help-all alone.
    """
    metadata = {"panel": panel, "help": text, "option": option, "everyday": everyday}
    return field(default=default, metadata=metadata)


def _everyday(panel: str, text: str, default: Any = MISSING, option: str | None = None) -> Any:
    """A setting that --help shows."""
    return _is(panel, text, default, option, everyday=True)


def _of_rosa(name: str) -> Any:
    """A setting that is `RosaConfig`'s own."""
    (found,) = (f for f in fields(RosaConfig) if f.name == name)
    return _is(METHOD, f"ROSA: {found.metadata['help']}", found.default)


@dataclass(frozen=True)
class RunSettings:
    """Every setting of a run, each with its default; saved as settings.json.

    What they mean stands with each, and is the help of `rosa train`. Four take None for what
    depends on another: `lr` for the method's own, `rank` for 8 where the method has one,
    `max_length` for 128 or a chat's 1024, `first_draw` for `first` of `RosaCallback`.
    """

    model: str = _everyday(DATA, "Pretrained model: a hub id or a folder.")
    output: Path = _everyday(OUTPUT, "Folder for what is trained and its metrics.")
    method: str = _everyday(METHOD, "What trains: {methods}.", "rosa")
    task: str | None = _everyday(DATA, "A task by name: {tasks}.", None)
    data: Path | None = _is(DATA, "Folder of the task's own files.", None)
    train: Path | None = _everyday(
        DATA,
        "A .csv, .tsv, .jsonl or .txt; columns text and label, prompt and completion, or messages.",
        None,
    )
    validation: Path | None = _everyday(
        DATA, "Validation file; else a tenth of the training data.", None
    )
    text_columns: tuple[str, ...] = _everyday(
        DATA, "Column of the text; two for pairs.", ("text",), "text_column"
    )
    label_column: str = _everyday(DATA, "Column of the label.", "label")
    chat_template: Path | None = _is(
        DATA, "File of the chats' template (Jinja), in place of the tokenizer's.", None
    )
    loss_on: str = _is(
        DATA, "Of a chat, learn: answers (the assistant's words), or all words.", "answers"
    )
    preference: bool = _everyday(
        DATA,
        "DPO on columns prompt, chosen and rejected.",
        False,
    )
    limit_train: int | None = _is(DATA, "Train on this many examples, drawn by the seed.", None)
    limit_test: int | None = _is(DATA, "Report on this many test examples, always the same.", None)
    hold_out: bool = _is(
        DATA,
        "Validate on a tenth of the training data; report the task's own set as test.",
        False,
    )
    rank: int | None = _everyday(METHOD, "Rank of the subspaces, or of LoRA's kin: 8.", None)
    alpha: float | None = _is(METHOD, "Scale is alpha / rank; default: rank (LoRA: 2 rank).", None)
    directions: str = _of_rosa("directions")
    trained: str = _of_rosa("trained")
    resample_every: str = _everyday(
        METHOD,
        "ROSA's draws: auto, epoch, never, 200 (steps).",
        "auto",
    )
    moments: str = _is(
        METHOD, f"ROSA: the optimizer's, at a resample: {', '.join(MOMENTS)}.", "clear"
    )
    first_draw: int | None = _is(
        METHOD,
        "ROSA: step of the first draw by the gradient; default: 32, or a tenth of a shorter "
        "training.",
        None,
    )
    target_modules: tuple[str, ...] = _everyday(
        METHOD,
        "all-linear, attention, or names (repeat it).",
        ("attention",),
    )
    target_parameters: tuple[str, ...] = _is(
        METHOD,
        "Single parameters to adapt too, as a mixture's experts.gate_up_proj (repeat the option).",
        (),
    )
    load_in: str = _everyday(
        METHOD,
        "Weights: full, 8bit, 4bit, hqq.",
        "full",
    )
    set: tuple[str, ...] = _everyday(
        METHOD,
        "Of its PEFT config: name=value (repeat it).",
        (),
    )
    lr: float | None = _everyday(TRAINING, "Peak learning rate; rosa's is 1e-3. Tune it.", None)
    beta: float = _is(TRAINING, "Of preferences: how close the model is held to what it was.", 0.1)
    epochs: float = _everyday(TRAINING, "Passes over the training data.", 3.0)
    steps: int | None = _everyday(TRAINING, "Optimizer steps, in place of epochs.", None)
    batch_size: int = _everyday(TRAINING, "Examples per device and step.", 32)
    eval_batch_size: int = _is(TRAINING, "Examples per step of evaluation.", 64)
    gradient_accumulation: int = _is(TRAINING, "Batches per optimizer step.", 1)
    gradient_checkpointing: bool = _is(
        TRAINING, "Compute layers again in the backward pass: less memory, a slower step.", False
    )
    weight_decay: float = _is(
        TRAINING, "AdamW's; ROSA's factors decay toward what they were drawn as.", 0.0
    )
    warmup: float = _is(TRAINING, "Share of the steps with rising rate.", 0.06)
    max_length: int | None = _everyday(DATA, "Longest text in tokens: 128, of chats 1024.", None)
    packing: bool = _is(
        DATA, "A decoder: several texts in a row of --max-length, none seeing another.", False
    )
    group_by_length: bool = _is(
        DATA, "Batches of texts of like length: less padding, faster.", False
    )
    deepspeed: Path | None = _is(
        TRAINING, "DeepSpeed's config (JSON): ZeRO over the processes that torchrun starts.", None
    )
    fsdp: bool = _is(
        TRAINING, "The weights in parts over the processes of torchrun (torch's FSDP 2).", False
    )
    on_nan: str = _is(
        TRAINING, "Where loss or gradient is NaN or infinite: stop, or skip the step.", "stop"
    )
    precision: str = _everyday(TRAINING, "auto (bf16 on a GPU), fp32, bf16.", "auto")
    seed: int = _everyday(TRAINING, "Seed of everything random.", 0)
    report_to: str = _is(OUTPUT, "Trackers as in Trainer: none, tensorboard, wandb, ...", "none")
    record_changes: bool = _is(OUTPUT, "Record the rank of the weights' change every epoch.", False)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the versions of the libraries."""
        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }
        lists = {name: list(v) for name, v in values.items() if isinstance(v, tuple)}
        names = ("rosa-finetune", "peft", "transformers", "torch", "datasets")
        return {**values, **lists, "versions": {name: version(name) for name in names}}


def convert(what: str, value: str, kind: str) -> Any:
    """A setting's value from a word, by its type's name; UserError says `what` takes another."""
    try:
        if kind.startswith("bool"):
            return {"true": True, "false": False}[value.lower()]
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
    except (KeyError, ValueError):
        raise UserError(f"{what} takes {kind}, got {value!r}") from None
    if kind.startswith("tuple"):
        return tuple(value.split(":"))
    return Path(value) if kind.startswith("Path") else value


def in_bf16(settings: RunSettings) -> bool:
    """Whether the run computes in bfloat16: as asked, or where a GPU has it."""
    import torch

    if settings.precision != "auto":
        return settings.precision == "bf16"
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
