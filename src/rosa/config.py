"""`RosaConfig`: every setting of a ROSA adapter, saved beside its weights."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft import PeftConfig

from rosa.checks import check_fields, check_task
from rosa.errors import UserError, UserTypeError, shown
from rosa.registration import ROSA

T = TypeVar("T", bound=PeftConfig)
MOMENTS = ("clear", "keep")
"""What can become of the optimizer's moments of the factors, when a new subspace is drawn."""
HINT = "a ROSA adapter: pip install rosa-finetune, and import rosa before PEFT loads it"
_CARD = """
## Loading this adapter

It is a ROSA adapter: PEFT knows the method once `rosa` is imported (`pip install rosa-finetune`),
and stops at `KeyError: 'ROSA'` without.

```python
import rosa  # registers ROSA with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""


_OF_LORA = {
    "lora_alpha": "alpha",
    "lora_dropout": "rosa_dropout",
    "init_lora_weights": "directions",
}
"""What `LoraConfig` calls its fields, and what is in their place here."""


def _told_of_lora(config: type[T]) -> type[T]:
    """Let a dataclass that is given fields of LoRA's say what is in their place."""
    init = config.__init__

    @functools.wraps(init)
    def told(self: T, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() & _OF_LORA.keys():  # PEFT looks for these words in old files
            raise UserTypeError(
                f"{config.__name__}.__init__() got an unexpected keyword argument {name!r}, which "
                f"is LoRA's: its place has {_OF_LORA[name]!r} here"
            )
        init(self, *args, **kwargs)

    config.__init__ = told
    return config


def _documented(config: type[T]) -> type[T]:
    """Append the help of a dataclass's own fields to its docstring, as the section Args."""
    own = [f for f in fields(config) if f.name in config.__annotations__]
    lines = [f"    {f.name}: {f.metadata['help']}" for f in own]
    config.__doc__ = "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Args:", *lines])
    return config


@_documented
@_told_of_lora
@dataclass
class RosaConfig(PeftConfig):
    """Configuration of a ROSA adapter (`RosaModel`); fields are named as in PEFT's `LoraConfig`.

    Raises:
        ValueError: a field's value is not allowed.
        TypeError: `r`, `alpha` or `seed` is not a number of the right kind.
    """

    r: int = field(
        default=8,
        metadata={"help": "Rank of the trained subspace of each weight, at most its smaller side."},
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "The factors' product is scaled by alpha / r, with the layer's own r; None "
            "means r, a scale of 1."
        },
    )
    directions: str = field(
        default="gradient",
        metadata={
            "help": "Where a subspace comes from: svd (singular triplets of the weight, a uniform "
            "random choice: the paper's), orthonormal (random directions, far cheaper to "
            "draw), gradient (once, directions in which the loss falls, see rosa.watch; random "
            "ones before and after, and where B alone is trained) or zero (nothing of the "
            "weight: a fresh zero product, as LoRA starts)."
        },
    )
    trained: str = field(
        default="both",
        metadata={
            "help": "Which factor learns: both, or one of them, A or B, while the other stays as "
            "drawn. For B alone no layer's input is kept for the backward pass: less memory "
            "than LoRA, so that a higher rank fits."
        },
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the draws, which depend on nothing else that draws random numbers."
        },
    )
    rosa_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout on the input of the factors. Unlike LoRA's, they hold a part of the "
            "pretrained weight, which is dropped with it: keep 0 unless you have reason."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt, a regex, or 'all-linear'; None takes PEFT's "
            "choice for the architecture."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of single parameters to adapt, for modules that use theirs by "
            "themselves, as the fused experts of a mixture do: "
            "['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']. Each expert has a subspace of "
            "its own."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules, or a regex, to leave alone."}
    )
    bias: Literal["none", "all", "rosa_only"] = field(
        default="none", metadata={"help": "Which biases to train: none, all or rosa_only."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to train in full and to save, such as a new head."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose rows of the input embedding are trained and saved, such as new "
            "ones; or {name of an embedding: tokens}. The embedding itself is not adapted then."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of layers that layers_to_transform indexes."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks that differ from r, by layer name or regex."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Alphas that differ from alpha, by layer name or regex."},
    )
    base_fingerprint: dict | None = field(
        default=None,
        metadata={"help": "Written on saving: which base weights the adapter belongs to."},
    )
    loading: str = field(
        default=HINT,
        metadata={"help": "Written on saving: how to load it where PEFT does not know ROSA."},
    )

    @property
    def is_informed(self) -> bool:
        """Whether the loss gradient decides what is drawn."""
        return self.directions == "gradient" and self.trained != "B"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does; a model card that PEFT has put there is told how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        # That of an adapter with a name lies one folder up.
        for card in (folder / "README.md", folder.resolve().parent / "README.md"):
            if card.is_file():
                _explain_loading(card)
                return

    def __post_init__(self) -> None:
        check_task(self.task_type)  # PEFT's own check shows all that was given
        super().__post_init__()
        self.peft_type = ROSA
        self.loading = HINT
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        check_fields(self)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError(
                "layers_to_transform needs target_modules to be a list of names, got the string "
                f"{shown(self.target_modules)}: name the layers in the regex instead"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern is only used with layers_to_transform: give both")
        if self.directions == "zero" and self.trained == "A":
            raise UserError(
                "directions='zero' begins with B at zero, which keeps A from learning: use "
                "trained='B' or 'both' with it"
            )


def _explain_loading(card: Path) -> None:
    """Add to a model card of PEFT's how ROSA's adapters are loaded, unless it says so."""
    with card.open(encoding="utf-8", newline="") as file:  # the line ends stay as they are
        text = file.read()
    if "library_name: peft" in text and "import rosa" not in text:
        with card.open("a", encoding="utf-8", newline="") as file:
            file.write(("" if text.endswith("\n") else "\n") + _CARD)


def as_rosa_config(config: PeftConfig) -> RosaConfig:
    """The config itself, if it is ROSA's; else UserTypeError."""
    if not isinstance(config, RosaConfig):
        raise UserTypeError(f"RosaModel needs a RosaConfig, got {type(config).__name__}")
    return config
