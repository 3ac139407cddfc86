"""Pretrained weights read from the files they came from, where else copies of them are kept."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from rosa.errors import UserError
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.files import WeightFile
from rosa.pretrained.sharding import check_unsharded

Files = dict[tuple[torch.dtype, torch.Size], list[tuple[Tensor, WeightFile]]]
"""By dtype and shape, since names may differ: the first numbers of each tensor, and where it is."""


def map_pretrained(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> int:
    """Let the model's own files hold its pretrained weights, instead of copies in main memory.

    While an adapter is in use an exact copy of every adapted weight in half precision is kept.
    Where the weights came from safetensors files that copy is on the disk already: it is mapped
    from there when it is needed, at each draw and switch. A float32 weight, of which no copy is
    kept, is then exact as well, where it else is to a rounding: disabling the adapter gives the
    pretrained weight back, and a resumed training is the uninterrupted one, to the last bit.
    Each weight is compared with its file first; one that has been cast, or changed since it was
    loaded, is copied as before. The files must stay as they are while the model is used: one that
    is gone or changed when it is needed raises ValueError, before anything is drawn.

    Args:
        model: with ROSA, wrapped or not.
        folder: the pretrained model's, or its name on the hub, whose files are taken from the
            cache; the one that the model was loaded from if None.

    Returns:
        How many bytes of weights are read from files from now on.

    Raises:
        ValueError: there is no ROSA in the model, there are no safetensors files, or they hold none
            of the adapted weights as they are in memory.
    """
    check_unsharded(model, "call rosa.map_pretrained before it is cut")
    layers = [layer for _, layer in rosa_layers(model) if not layer.is_quantized]
    if not layers:
        raise UserError("the model has no ROSA layers whose weights lie in a file")
    name = folder if folder is not None else getattr(model, "name_or_path", "") or _name_of(model)
    files = _tensors_in(_folder_of(os.fspath(name)))
    mapped = 0
    for layer in layers:
        weight = layer.base_weight
        there = files[weight.parameter.dtype, weight.parameter.shape]
        first = weight.pretrained_as_stored().flatten()[:16].cpu()
        near = [file for begins, file in there if torch.allclose(begins, first, 1e-3, 1e-3)]
        if any(weight.keep_in(file) for file in near):
            mapped += weight.parameter.nbytes
    if not mapped:
        raise UserError(
            f"the files in {name} hold none of the adapted weights as they are in memory: load the "
            "model in its files' own precision, or give the folder that it was loaded from"
        )
    return mapped


def _name_of(model: nn.Module) -> str:
    """Where transformers has loaded the model from; empty if it has not."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or ""


def _folder_of(name: str) -> Path:
    if not name:
        raise UserError("nobody knows what the model was loaded from: give its folder")
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise UserError(
            f"{name} is no folder, and no model in the hub's cache: give the folder that the model "
            "was loaded from"
        ) from error


def _tensors_in(folder: Path) -> Files:
    found: Files = defaultdict(list)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"there are no safetensors files in {folder}")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no dict
                tensor = file.get_tensor(key)
                if tensor.is_floating_point():
                    first = tensor.flatten()[:16].clone()
                    found[tensor.dtype, tensor.shape].append((first, WeightFile(path, key)))
    return found
