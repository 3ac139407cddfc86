"""A ROSA adapter on a plain transformers model: its own `load_adapter`, and `from_pretrained`.

Transformers places tensors by the names of parameters, which an offset is none of. So a ROSA
adapter is loaded there as PEFT does it: into the model itself, which stays of its own class.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import peft
from peft import PeftConfig, inject_adapter_in_model
from peft.utils import load_peft_weights
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.peft_utils import find_adapter_config_file

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.files.checking import check_weights, read_config
from rosa.files.restoring import or_without
from rosa.layers.drawing import from_file
from rosa.registration import ROSA

_PREFIX = "base_model.model."
"""Of the names in an adapter's file; a plain model has none."""
_HUB = ("subfolder", "revision", "cache_dir", "force_download", "token", "local_files_only")
"""What says where on the hub an adapter is."""
_OPTIONS = {field.name for field in dataclasses.fields(LoadStateDictConfig)}
"""What transformers' `load_adapter` takes by its `**kwargs`."""


def guarded_plain(load: Any) -> Any:
    """Transformers' `load_adapter`, which takes ROSA's adapters too."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def load_adapter(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(self, *args, **kwargs).arguments
        more = asked.pop("kwargs", {})
        name = asked.get("adapter_name") or "default"
        with or_without(self, name):
            if _is_rosa({**more, **asked}):
                if unknown := more.keys() - _OPTIONS:
                    raise TypeError(f"load_adapter has no argument {', '.join(unknown)}")
                return _load(self, name, {**more, **asked})
            return load(self, *args, **kwargs)

    return load_adapter


def _is_rosa(asked: Mapping[str, Any]) -> bool:
    """Whether the adapter that is asked for is ROSA's, by its config."""
    if asked.get("hotswap") is True:  # which is LoRA's alone, and transformers says so
        return False
    if asked.get("peft_config") is not None:
        return isinstance(asked["peft_config"], RosaConfig)
    place, how = _source(asked)
    file = None if place is None else find_adapter_config_file(place, **how)
    if file is None:
        return False
    return (read_config(Path(file).parent) or {}).get("peft_type") == ROSA


def _source(asked: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """A folder or a name on the hub, and where there."""
    loaded = asked.get("load_config")
    how = {
        **getattr(loaded, "download_kwargs", {}),
        **asked.get("download_kwargs", {}),
        **(asked.get("adapter_kwargs") or {}),
    }
    how = {name: how[name] for name in _HUB if how.get(name) is not None}
    if asked.get("local_files_only"):
        how["local_files_only"] = True
    known = getattr(loaded, "pretrained_model_name_or_path", None)
    return asked.get("peft_model_id") or known, how


def _load(model: PreTrainedModel, name: str, asked: Mapping[str, Any]) -> LoadStateDictInfo:
    """Load a ROSA adapter as PEFT does; raises as that does, and if there is one of the name."""
    if name in (getattr(model, "peft_config", None) or {}):
        raise UserError(f"Adapter with name {name} already exists. Please use a different name.")
    (place, how), config = _source(asked), asked.get("peft_config")
    trains, low = (bool(asked.get(each)) for each in ("is_trainable", "low_cpu_mem_usage"))
    state = asked.get("adapter_state_dict")
    if config is None:
        config = PeftConfig.from_pretrained(str(place), **how)
    if state is None:
        check_weights(str(place), how)
        state = load_peft_weights(str(place), "cpu", **how)
    config.inference_mode = not trains
    before = WeakSet(model.modules())  # whoever holds a module shares it
    with from_file(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=low)
        named = {key.removeprefix(_PREFIX): value for key, value in state.items()}
        peft.set_peft_model_state_dict(model, named, name, low_cpu_mem_usage=low)
    model._hf_peft_config_loaded = True
    if not trains:
        model.eval()
    else:  # what is new is as what it was put into
        for module in model.modules():
            if module not in before:
                module.training = model.training
    empty: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    names = [field.name for field in dataclasses.fields(LoadStateDictInfo)]
    return LoadStateDictInfo(**{each: empty.get(each, set()) for each in names})
