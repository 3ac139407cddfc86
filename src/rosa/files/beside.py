"""What an adapter's file holds beside factors and offsets, and the checks of it.

That is modules trained in full, such as heads, biases, rows of tokens, and embeddings, which PEFT
saves where they were adapted or resized. Nothing else of a model is an adapter's to change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar

from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from rosa.algebra.lowrank import are_finite
from rosa.errors import UserError, UserTypeError, shown
from rosa.pretrained.weight import SUPPORTED_DTYPES

_SHARDED = "_fsdp_wrapped_module."
_MISSIZED: ContextVar[bool] = ContextVar("_MISSIZED", default=False)


@contextlib.contextmanager
def leaving_missized(ignore: bool) -> Iterator[None]:
    """While a state dict is loaded: whether PEFT leaves out what is of other sizes, and warns."""
    token = _MISSIZED.set(ignore)
    try:
        yield
    finally:
        _MISSIZED.reset(token)


def check_tensors(state_dict: dict[str, Tensor]) -> None:
    """Raise UserTypeError unless a state dict holds tensors by name, and they are in memory."""
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_meta:
            what = "a tensor without memory" if isinstance(value, Tensor) else type(value).__name__
            raise UserTypeError(
                f"an adapter's state dict is of tensors by name; {shown(name)} is {what}"
            )


def check_whole_modules(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Raise UserError if a state dict lacks a part of what an adapter trains beside its factors.

    Args:
        model: with the adapter.
        adapter_name: its name.
        state_dict: with the names of a file.
    """
    missing = [key for key, _ in _whole_modules(model, adapter_name) if key not in state_dict]
    if missing:
        raise UserError(
            f"the adapter file lacks {len(missing)} tensors of modules that were trained in full, "
            f"or of tokens, such as {missing[0]}: it is incomplete, is of another adapter, or "
            "modules_to_save, task_type or trainable_token_indices in adapter_config.json is not "
            "the one that it was saved with"
        )


def check_beside(
    model: nn.Module,
    adapter_name: str,
    state_dict: dict[str, Tensor],
    biases: Iterable[str],
    in_file: Callable[[str], str],
) -> dict[str, Tensor]:
    """What a file holds beside ROSA's own tensors, in the model's precision.

    Args:
        model: with the adapter.
        adapter_name: its name.
        state_dict: all but factors and offsets, with the names of the model.
        biases: the names of those that the adapter trains.
        in_file: what a name is in a file.

    Raises:
        UserError: a tensor has no place in the model but as a weight of the base model, is of
            another shape or kind of numbers, or has NaN or infinity; or a trained bias is missing.
            Nothing has been changed then.
    """
    whole = {key: name for name, key in _whole_modules(model, adapter_name)}
    twice = set(held_twice(model, state_dict)) - whole.keys()
    state_dict = {key: value for key, value in state_dict.items() if key not in twice}
    own, parameters = own_tensors(model), set(own_tensors(model, buffers=False))
    around = tuple(
        f"{_named(n)}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)
    )
    biases = list(biases)
    embeddings = tuple(_embeddings(model))
    places = {*biases, *(key for key in own if key.startswith(embeddings))}
    places = {*whole} | places | {in_file(key) for key in places}
    foreign = sorted(key for key in state_dict if key not in places)
    if foreign:
        raise UserError(
            f"{len(foreign)} tensors of the adapter file have no place in an adapter, such as "
            f"{shown(foreign[0], 200)}: it would change other weights than those that its config "
            "names. It is damaged, or of another model or another modules_to_save or bias"
        )
    missing = sorted(k for k in biases if k not in state_dict and not k.startswith(around))
    if missing:
        raise UserError(
            f"the adapter file lacks {len(missing)} trained biases, such as {missing[0]}: it is "
            "incomplete, or was saved with another `bias` than adapter_config.json has"
        )
    result = {}
    for key, value in state_dict.items():
        like = own.get(key)
        reason = None if like is None else _misfit(value, like, finite=key in parameters)
        if reason:
            raise UserError(
                f"the adapter file's {whole.get(key, key)} {reason}: it is damaged, or belongs to "
                "another base model (one with other labels, or whose tokens were not resized alike)"
            )
        floats = like is not None and value.is_floating_point() and value.shape == like.shape
        result[key] = value.to(like.dtype) if floats else value  # type: ignore[union-attr]
    return result


def held_twice(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of some names that are of a module that is saved whole, by where it lies in a wrapper.

    PEFT saves its biases by these names too (``bias="all"``), which hold the adapter's.
    """
    inside = tuple(
        f"{_named(name)}.{held}."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for held in ("original_module", "modules_to_save")
    )
    return [name for name in names if name.startswith(inside) and "bias" in name]


def own_tensors(model: nn.Module, buffers: bool = True) -> dict[str, Tensor]:
    """The parameters and buffers of a model by their names in a state dict, shared ones too."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if buffers:
        found.update(model.named_buffers(remove_duplicate=False))
    return {_named(name): tensor for name, tensor in found.items()}


def tensors_beside(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """The names in a state dict of what PEFT may save beside factors and biases."""
    modules = model.named_modules()
    wrappers = (f"{_named(n)}." for n, m in modules if isinstance(m, AuxiliaryTrainingWrapper))
    begins = (*wrappers, *_embeddings(model))
    return [name for name in state_dict if name.startswith(begins)]


def _misfit(value: Tensor, like: Tensor, finite: bool) -> str | None:
    """Why a tensor cannot be put where another one is; None if it can."""
    floats = value.dtype in SUPPORTED_DTYPES and like.dtype in SUPPORTED_DTYPES
    if value.dtype != like.dtype and not floats:
        return f"is of {value.dtype}, the model's is of {like.dtype}"
    if value.shape != like.shape and not _MISSIZED.get():
        return f"has the shape {tuple(value.shape)}, the model's {tuple(like.shape)}"
    if finite and value.dtype in SUPPORTED_DTYPES and not are_finite([value]):
        return "has NaN or infinity"
    return None


def _whole_modules(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str]]:
    """The names of all that an adapter trains beside factors and biases: in a file, in a model."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            for key, place in module.adapter_state_dict_load_map(adapter_name).items():
                yield f"{_named(name)}.{key}", f"{_named(name)}.{place}"


def _embeddings(model: nn.Module) -> Iterator[str]:
    """How the names begin of the model's embeddings, which PEFT may have saved."""
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, get)()
        except (AttributeError, NotImplementedError):  # it has none
            continue
        for name, module in model.named_modules(remove_duplicate=False):
            if layer is not None and module is layer:
                yield f"{_named(name)}."


def _named(name: str) -> str:
    """A name as state dicts have it."""
    return name.removeprefix(_SHARDED)
