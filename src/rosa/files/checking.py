"""What an adapter's folder must be, before anything of it is loaded."""

from __future__ import annotations

import contextlib
import json
import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from rosa.config import RosaConfig
from rosa.errors import UserError, shown

GIVEN_CONFIG = ContextVar("GIVEN_CONFIG", default=False)
"""Whether an adapter is loaded by another config than its folder's, which the caller has given."""


def read_config(folder: Path) -> dict[str, Any] | None:
    """A folder's adapter_config.json, None if it has none; UserError if it cannot be one."""
    file = folder / CONFIG_NAME
    if not file.exists():
        return None
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
    return found


def check_trained(folder: Path, config: RosaConfig) -> None:
    """Raise UserError if a folder is of an adapter of which other factors were trained.

    Its optimizer would be of other parameters, as where Trainer resumes.
    """
    found = None if GIVEN_CONFIG.get() else read_config(folder)
    if found is None:
        return
    there = found.get("trained", "both")
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
    folder = folder_of(model_id, kwargs)
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


def folder_of(model_id: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    """Where an adapter is if it is on this machine."""
    return Path(model_id, kwargs.get("subfolder") or "")
