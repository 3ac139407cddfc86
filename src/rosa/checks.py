"""What may stand in each field of a `RosaConfig`, whoever wrote it: a program, or a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import TaskType

from rosa.algebra.subspace import DIRECTIONS
from rosa.errors import UserError, UserTypeError, shown
from rosa.patterns import check_pattern

TRAINED = ("both", "A", "B")
"""Which factor can be trained: one alone leaves the other as it was drawn."""
BIASES = ("none", "all", "rosa_only")


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)


def _is_indices(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(i) is int and i >= 0 for i in value)


def _is_fingerprint(value: object) -> bool:
    if not isinstance(value, dict) or not {"dtypes", "layers"} <= set(value):
        return False
    dtypes, layers = value["dtypes"], value["layers"]
    known = isinstance(dtypes, (list, tuple)) and all(map(_is_dtype, dtypes))
    return known and isinstance(layers, dict) and all(map(_is_two_numbers, layers.values()))


def _is_dtype(name: object) -> bool:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return known or name == "quantized"


def _is_two_numbers(value: object) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and all(is_number(each) for each in value)  # type: ignore[union-attr]


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and one that a float can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


_NAME = "a string or None", lambda value: isinstance(value, str)
_WHICH = (
    "a list of names, a regex or None",
    lambda value: isinstance(value, str) or _is_names(value),
)
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_version": _NAME,
    "base_model_name_or_path": _NAME,
    "revision": _NAME,
    "auto_mapping": ("a dictionary or None", lambda value: isinstance(value, dict)),
    "target_modules": _WHICH,
    "exclude_modules": _WHICH,
    "layers_pattern": _WHICH,
    "target_parameters": ("a list of names or None", _is_names),
    "modules_to_save": ("a list of names or None", _is_names),
    "layers_to_transform": (
        "the index of a layer, a list of such or None",
        lambda value: _is_indices(value if isinstance(value, list) else [value]),
    ),
    "rank_pattern": ("a dictionary of ranks by names", lambda value: isinstance(value, dict)),
    "alpha_pattern": ("a dictionary of alphas by names", lambda value: isinstance(value, dict)),
}
"""Fields that may be None, and what else they are."""


def check_task(task_type: object) -> None:
    """Raise UserError unless PEFT knows a task by this name; None is no task."""
    if task_type is not None:
        _check_choice("task_type", task_type, tuple(task.value for task in TaskType))


def check_fields(config: Any) -> None:
    """Raise UserError or UserTypeError, naming the field, unless a config's values are allowed."""
    for name, (what, allows) in _ALLOWED.items():
        value = getattr(config, name)
        if value is not None and not allows(value):
            raise UserTypeError(f"{name} must be {what}, got {shown(value)}")
    if not isinstance(config.inference_mode, bool):
        raise UserTypeError(f"inference_mode must be a bool, got {shown(config.inference_mode)}")
    if config.base_fingerprint is not None and not _is_fingerprint(config.base_fingerprint):
        raise UserError(
            "base_fingerprint is written by ROSA when it saves; this one is damaged: remove it "
            "from adapter_config.json to load without the check of the base weights"
        )
    _check_numbers(config)
    _check_patterns(config)
    _check_tokens(config.trainable_token_indices)
    _check_choice("directions", config.directions, DIRECTIONS)
    _check_choice("trained", config.trained, TRAINED)
    _check_choice("bias", config.bias, BIASES)


def _check_numbers(config: Any) -> None:
    check_rank("r", config.r)
    for name, rank in config.rank_pattern.items():
        check_rank(f"rank_pattern[{shown(name)}]", rank)
    if config.alpha is not None:
        _check_alpha("alpha", config.alpha)
    for name, alpha in config.alpha_pattern.items():
        _check_alpha(f"alpha_pattern[{shown(name)}]", alpha)
    if isinstance(config.seed, bool) or not isinstance(config.seed, int):
        raise UserTypeError(f"seed must be an integer, got {shown(config.seed)}")
    dropout = config.rosa_dropout
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"rosa_dropout must be at least 0 and below 1, got {shown(dropout)}")


def _check_patterns(config: Any) -> None:
    """Of all that PEFT takes as a regex, or puts into one."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field), str):
            check_pattern(field, getattr(config, field))
    layers = config.layers_pattern or ()
    inside = {
        "modules_to_save": config.modules_to_save or (),
        "layers_pattern": [layers] if isinstance(layers, str) else layers,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    }
    for field, patterns in inside.items():
        for pattern in patterns:
            if not isinstance(pattern, str) or not pattern:
                raise UserTypeError(f"{field} must have names in it, got {shown(pattern)}")
            check_pattern(field, pattern)


def check_rank(name: str, rank: object) -> None:
    """Raise TypeError or ValueError unless `rank` is a positive integer, naming it `name`."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise UserTypeError(f"{name} must be a positive integer, got {shown(rank)}")
    if rank <= 0:
        raise UserError(f"{name} must be a positive integer, got {shown(rank)}")


def _check_alpha(name: str, alpha: object) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UserTypeError(f"{name} must be a positive number, got {shown(alpha)}")
    if not is_number(alpha) or alpha <= 0:
        raise UserError(f"{name} must be a positive number, got {shown(alpha)}")


def _check_tokens(tokens: object) -> None:
    lists = tokens.values() if isinstance(tokens, dict) else [[] if tokens is None else tokens]
    for each in lists:
        if not isinstance(each, list) or not all(type(t) is int and t >= 0 for t in each):
            raise UserTypeError(
                "trainable_token_indices must be a list of tokens' numbers, or {name of an "
                f"embedding: such a list}}, got {shown(tokens)}"
            )
        if len(set(each)) < len(each):
            raise UserError(f"trainable_token_indices has a token twice: {shown(tokens)}")
    if isinstance(tokens, dict) and not all(isinstance(name, str) and name for name in tokens):
        raise UserTypeError(f"trainable_token_indices must have names, got {shown(tokens)}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}")
