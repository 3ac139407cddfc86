"""`RosaConfig`: every setting of a ROSA adapter, saved beside its weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from peft import PeftConfig

from rosa.algebra.subspace import DIRECTIONS
from rosa.errors import UserError, UserTypeError
from rosa.registration import ROSA

T = TypeVar("T", bound=PeftConfig)
MOMENTS = ("clear", "keep")
"""What can become of the optimizer's moments of the factors, when a new subspace is drawn."""
TRAINED = ("both", "A", "B")
"""Which factor can be trained: one alone leaves the other as it was drawn."""
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


def _documented(config: type[T]) -> type[T]:
    """Append the help of a dataclass's own fields to its docstring, as the section Args."""
    own = [f for f in fields(config) if f.name in config.__annotations__]
    lines = [f"    {f.name}: {f.metadata['help']}" for f in own]
    config.__doc__ = "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Args:", *lines])
    return config


@_documented
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
            "help": "The factors' product is scaled by alpha / r; None means r, a scale of 1."
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
        super().__post_init__()
        self.peft_type = ROSA
        self.loading = HINT
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_parameters, str):
            raise UserTypeError(
                f"target_parameters must be a list of names, got {self.target_parameters!r}"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError(
                "layers_to_transform needs target_modules to be a list of names, got the string "
                f"{self.target_modules!r}: name the layers in the regex instead"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern is only used with layers_to_transform: give both")

        check_rank("r", self.r)
        for name, rank in (self.rank_pattern or {}).items():
            check_rank(f"rank_pattern[{name!r}]", rank)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        for name, alpha in (self.alpha_pattern or {}).items():
            _check_alpha(f"alpha_pattern[{name!r}]", alpha)
        _check_choice("directions", self.directions, DIRECTIONS)
        _check_choice("trained", self.trained, TRAINED)
        if self.directions == "zero" and self.trained == "A":
            raise UserError(
                "directions='zero' begins with B at zero, which keeps A from learning: use "
                "trained='B' or 'both' with it"
            )
        _check_tokens(self.trainable_token_indices)
        _check_choice("bias", self.bias, ("none", "all", "rosa_only"))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserTypeError(f"seed must be an integer, got {self.seed!r}")
        if self.base_fingerprint and not {"dtypes", "layers"} <= set(self.base_fingerprint):
            raise UserError(
                "base_fingerprint is written by ROSA when it saves; this one is damaged: remove it "
                "from adapter_config.json to load without the check of the base weights"
            )
        if not 0 <= self.rosa_dropout < 1:
            raise UserError(f"rosa_dropout must be at least 0 and below 1, got {self.rosa_dropout}")


def _explain_loading(card: Path) -> None:
    """Add to a model card of PEFT's how ROSA's adapters are loaded, unless it says so."""
    with card.open(encoding="utf-8", newline="") as file:  # the line ends stay as they are
        text = file.read()
    if "library_name: peft" in text and "import rosa" not in text:
        with card.open("a", encoding="utf-8", newline="") as file:
            file.write(("" if text.endswith("\n") else "\n") + _CARD)


def check_rank(name: str, rank: object) -> None:
    """Raise TypeError or ValueError unless `rank` is a positive integer, naming it `name`."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise UserTypeError(f"{name} must be a positive integer, got {rank!r}")
    if rank <= 0:
        raise UserError(f"{name} must be a positive integer, got {rank}")


def _check_alpha(name: str, alpha: object) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserTypeError(f"{name} must be a positive number, got {alpha!r}")
    if not 0 < alpha < float("inf"):
        raise UserError(f"{name} must be a positive number, got {alpha}")


def _check_tokens(tokens: object) -> None:
    lists = tokens.values() if isinstance(tokens, dict) else [[] if tokens is None else tokens]
    for each in lists:
        if not isinstance(each, list) or not all(type(t) is int and t >= 0 for t in each):
            raise UserTypeError(
                "trainable_token_indices must be a list of tokens' numbers, or {name of an "
                f"embedding: such a list}}, got {tokens!r}"
            )
        if len(set(each)) < len(each):
            raise UserError(f"trainable_token_indices has a token twice: {tokens!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def as_rosa_config(config: PeftConfig) -> RosaConfig:
    """The config itself, if it is ROSA's; else UserTypeError."""
    if not isinstance(config, RosaConfig):
        raise UserTypeError(f"RosaModel needs a RosaConfig, got {type(config).__name__}")
    return config
