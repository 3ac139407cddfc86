"""PEFT's loading of adapters: all of one or nothing, where it is ROSA's.

PEFT asks `RosaModel` about a file's tensors, but nobody before it reads or writes a folder, nor
when it has failed. So its functions are wrapped; for other methods they do what they did.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import ref

import peft
import peft.peft_model
import peft.utils
import peft.utils.save_and_load
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    TrainableTokensWrapper,
)
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from rosa.config import RosaConfig
from rosa.errors import UserError, shown
from rosa.files.beside import check_tensors, check_whole_modules, leaving_missized
from rosa.layers.drawing import from_file
from rosa.layers.in_model import rosa_layers
from rosa.registration import ROSA


@contextlib.contextmanager
def as_before(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Let a model be what it was before, where adding one of ROSA's adapters to it fails.

    Its modules are those that they were, so are what is trained of them and the other adapters. An
    adapter that was there before is left alone.

    Args:
        model: a plain model, or one with adapters.
        adapter_name: of the new one.
    """
    if any(adapter_name in layer.adapters for _, layer in rosa_layers(model)):
        yield
        return
    configured = hasattr(model, "peft_config")
    # Parameters weakly: whoever holds one shares it, and the adapter would be given a copy.
    held = {m: (dict(m._modules), _weakly(m._parameters)) for m in model.modules()}
    trained = [(ref(parameter), parameter.requires_grad) for parameter in model.parameters()]
    wrappers = [
        (module, set(module._adapters), module._active_adapter)
        for module in held
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    except BaseException:
        ours = [layer for _, layer in rosa_layers(model) if adapter_name in layer.adapters]
        known: Any = getattr(model, "peft_config", None) or {}
        if not ours and not isinstance(known.get(adapter_name), RosaConfig):
            raise
        for layer in reversed(ours):  # what lies inside first
            layer.delete_adapter(adapter_name)
        for wrapper, adapters, active in wrappers:
            if isinstance(wrapper, TrainableTokensWrapper) and adapter_name not in adapters:
                wrapper.token_adapter.delete_adapter(adapter_name)
            wrapper._adapters, wrapper._active_adapter = adapters, active  # type: ignore[assignment]
        for module, (modules, parameters) in held.items():
            now = module._parameters
            there = {n: _found(each, now.get(n)) for n, each in parameters.items()}
            module.__dict__.update(_modules=modules, _parameters=there)
        for parameter, was_trained in ((found(), state) for found, state in trained):
            if parameter is not None:
                parameter.requires_grad_(was_trained)
        known.pop(adapter_name, None)
        if not configured and "peft_config" in vars(model):
            del model.peft_config
        raise


def _weakly(parameters: Mapping[str, Any]) -> dict[str, ref[Any] | None]:
    return {name: None if each is None else ref(each) for name, each in parameters.items()}


def _found(known: ref[Any] | None, now: Any) -> Any:
    """The parameter that was there; the one that is, if that is no more."""
    before = None if known is None else known()
    return now if known is not None and before is None else before


def check_config(folder: Path) -> None:
    """Raise UserError if a folder's adapter_config.json cannot be one; nothing if it has none."""
    file = folder / CONFIG_NAME
    if not file.exists():
        return
    if not file.is_file():
        raise UserError(f"{file} is not a file: the adapter's folder is damaged")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{file} is not valid JSON ({reason}): the file is damaged") from error
    method = found.get("peft_type") if isinstance(found, dict) else None
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(
            f"{file} is of no adapter that PEFT knows: its peft_type is {shown(method)}. It is "
            "damaged, or of a newer PEFT"
        )


_GIVEN_CONFIG = ContextVar("_GIVEN_CONFIG", default=False)
"""Whether an adapter is loaded by another config than its folder's, which the caller has given."""


def check_trained(folder: Path, config: RosaConfig) -> None:
    """Raise UserError if a folder is of an adapter of which other factors were trained.

    Its optimizer would be of other parameters, as where Trainer resumes.
    """
    file = folder / CONFIG_NAME
    if not file.is_file() or _GIVEN_CONFIG.get():
        return
    check_config(folder)
    there = json.loads(file.read_text(encoding="utf-8")).get("trained", "both")
    if there != config.trained:
        raise UserError(
            f"{folder} is of a training of factors {shown(there)}, this one is of "
            f"{config.trained!r}: give RosaConfig the same trained=, or begin anew with it by "
            "PeftModel.from_pretrained(base, folder, config=..., is_trainable=True)"
        )


def check_weights(model_id: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """Raise UserError or FileNotFoundError unless a ROSA adapter has weights that are no pickle.

    Args:
        model_id: the adapter's folder, or its name on the hub.
        kwargs: what PEFT is given beside it.
    """
    folder = _folder(model_id, kwargs)
    weights, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if weights.is_file():
        return
    if weights.exists():
        raise UserError(f"{weights} is not a file: the adapter's folder is damaged")
    if folder.is_dir() and not pickled.exists():
        raise FileNotFoundError(f"{folder} has no {weights.name}: its weights are missing")
    if not folder.is_dir():
        with contextlib.suppress(EntryNotFoundError):
            how = PeftConfig._split_kwargs(kwargs)[0]
            hf_hub_download(str(model_id), SAFETENSORS_WEIGHTS_NAME, **how)
            return
    raise UserError(
        f"{model_id} has no {weights.name}, and another file of weights ({WEIGHTS_NAME}) is a "
        "pickle, which can run code and is not read: save the adapter again by save_pretrained"
    )


def guard() -> None:
    """Wrap PEFT's functions; called once, when ROSA is registered."""
    PeftModel.from_pretrained = classmethod(_guarded_pretrained(PeftModel.from_pretrained.__func__))  # type: ignore[attr-defined,method-assign]
    PeftModel.load_adapter = _guarded_adapter(PeftModel.load_adapter)  # type: ignore[method-assign]
    PeftAdapterMixin.load_adapter = _guarded_elsewhere(PeftAdapterMixin.load_adapter)  # type: ignore[method-assign]
    PeftModel.save_pretrained = _guarded_save(PeftModel.save_pretrained)  # type: ignore[method-assign]
    PeftModel.set_adapter = _guarded_switch(PeftModel.set_adapter)  # type: ignore[method-assign]
    guarded = _guarded_state(peft.utils.save_and_load.set_peft_model_state_dict)
    for module in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        module.set_peft_model_state_dict = guarded  # type: ignore[attr-defined]


def _guarded_pretrained(load: Any) -> Any:
    @functools.wraps(load)
    def from_pretrained(
        cls: type[PeftModel],
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> PeftModel:
        if config is None:
            check_config(_folder(model_id, kwargs))
        elif isinstance(config, RosaConfig):
            check_weights(model_id, kwargs)
        by_config = _GIVEN_CONFIG.set(config is not None)
        with as_before(model, adapter_name), from_file():
            try:
                return load(cls, model, model_id, adapter_name, is_trainable, config, **kwargs)
            except AttributeError as error:
                found = (getattr(model, "peft_config", None) or {}).get(adapter_name)
                if not isinstance(found, RosaConfig):
                    raise
                raise UserError(
                    f"an adapter with task_type={found.task_type} cannot be put on a "
                    f"{type(model).__name__} ({error}): load the model that it was trained on"
                ) from error
            finally:
                _GIVEN_CONFIG.reset(by_config)

    return from_pretrained


def _guarded_adapter(load: Any) -> Any:
    @functools.wraps(load)
    def load_adapter(
        self: PeftModel,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if adapter_name not in self.peft_config:
            check_config(_folder(model_id, kwargs))
        if self.peft_type != ROSA:
            return load(self, model_id, adapter_name, *args, **kwargs)
        check_weights(model_id, kwargs)
        known = self.peft_config.get(adapter_name)
        if isinstance(known, RosaConfig) and (args[:1] == (True,) or kwargs.get("is_trainable")):
            check_trained(_folder(model_id, kwargs), known)
        with as_before(self, adapter_name), from_file():
            return load(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def _guarded_elsewhere(load: Any) -> Any:
    """Of transformers, which cannot load ROSA's adapters: the error is the offset's."""

    @functools.wraps(load)
    def load_adapter(
        self: Any,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        before = self._hf_peft_config_loaded
        try:
            with as_before(self, adapter_name or "default"):
                return load(self, peft_model_id, adapter_name, *args, **kwargs)
        except BaseException:
            self._hf_peft_config_loaded = before
            raise

    return load_adapter


def _guarded_save(save: Any) -> Any:
    @functools.wraps(save)
    def save_pretrained(
        self: PeftModel,
        save_directory: str,
        safe_serialization: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if not safe_serialization and self.peft_type == ROSA:
            raise UserError(
                "safe_serialization=False would write a pickle, which can run code and is not read "
                "again: leave it out"
            )
        save(self, save_directory, safe_serialization, *args, **kwargs)

    return save_pretrained


def _guarded_switch(switch: Any) -> Any:
    @functools.wraps(switch)
    def set_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        before, is_rosa = self.active_adapter, self.peft_type == ROSA
        try:
            switch(self, *args, **kwargs)
        except BaseException:
            if is_rosa:  # PEFT has taken the new name before it asks for it
                self.active_adapter = before
            raise

    return set_adapter


def _guarded_state(load: Any) -> Any:
    @functools.wraps(load)
    def set_peft_model_state_dict(
        model: nn.Module,
        peft_model_state_dict: dict[str, Any],
        adapter_name: str = "default",
        ignore_mismatched_sizes: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> Any:
        configs: Any = getattr(model, "peft_config", None) or {}
        if isinstance(configs.get(adapter_name), RosaConfig):
            check_tensors(peft_model_state_dict)
            check_whole_modules(model, adapter_name, peft_model_state_dict)
        how = adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage
        with leaving_missized(ignore_mismatched_sizes):
            return load(model, peft_model_state_dict, *how)

    return set_peft_model_state_dict


def _folder(model_id: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    """Where an adapter is if it is on this machine."""
    return Path(model_id, kwargs.get("subfolder") or "")
