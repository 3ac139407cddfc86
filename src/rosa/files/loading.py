"""PEFT's loading of adapters: all of one or nothing, where it is ROSA's.

PEFT asks `RosaModel` about a file's tensors, but nobody before it reads or writes a folder, nor
when it has failed. So its functions are wrapped; for other methods they do what they did.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import peft
import peft.peft_model
import peft.utils
import peft.utils.save_and_load
from peft import PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.files.beside import check_tensors, check_whole_modules, leaving_missized
from rosa.files.checking import (
    GIVEN_CONFIG,
    check_trained,
    check_weights,
    folder_of,
    read_config,
)
from rosa.files.plain import guarded_plain
from rosa.files.restoring import or_without
from rosa.layers.drawing import from_file
from rosa.layers.in_model import rosa_layers
from rosa.layers.undoing import or_else
from rosa.registration import ROSA


def guard() -> None:
    """Wrap PEFT's functions; called once, when ROSA is registered."""
    PeftModel.from_pretrained = classmethod(_guarded_pretrained(PeftModel.from_pretrained.__func__))  # type: ignore[attr-defined,method-assign]
    PeftModel.load_adapter = _guarded_adapter(PeftModel.load_adapter)  # type: ignore[method-assign]
    PeftAdapterMixin.load_adapter = guarded_plain(PeftAdapterMixin.load_adapter)  # type: ignore[method-assign]
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
            read_config(folder_of(model_id, kwargs))
        elif isinstance(config, RosaConfig):
            check_weights(model_id, kwargs)
        by_config = GIVEN_CONFIG.set(config is not None)
        with or_without(model, adapter_name), from_file():
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
                GIVEN_CONFIG.reset(by_config)

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
            read_config(folder_of(model_id, kwargs))
        if self.peft_type != ROSA:
            return load(self, model_id, adapter_name, *args, **kwargs)
        check_weights(model_id, kwargs)
        known = self.peft_config.get(adapter_name)
        if isinstance(known, RosaConfig) and (args[:1] == (True,) or kwargs.get("is_trainable")):
            check_trained(folder_of(model_id, kwargs), known)
        with or_without(self, adapter_name), from_file():
            return load(self, model_id, adapter_name, *args, **kwargs)

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
        # PEFT has taken the new name before it asks for it.
        undo = partial(setattr, self, "active_adapter", self.active_adapter)
        with or_else(undo) if self.peft_type == ROSA else nullcontext():
            switch(self, *args, **kwargs)

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
        is_rosa = isinstance(configs.get(adapter_name), RosaConfig)
        if is_rosa:
            check_tensors(peft_model_state_dict)
            check_whole_modules(model, adapter_name, peft_model_state_dict)
        how = adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage
        with leaving_missized(ignore_mismatched_sizes):
            found = load(model, peft_model_state_dict, *how)
        for _, layer in rosa_layers(model) if is_rosa else ():
            if layer.base_weight.shard is not None:  # which the next pass makes whole
                layer.settle(looks=False)
        return found

    return set_peft_model_state_dict
