"""A plain model with the adapter merged, of the base's own class.

What is written is loaded back as a user would, and compared, before it takes its place.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rosa.errors import ExportError, UserError
from rosa.export.staging import rosa_adapter, staged
from rosa.layers.kinds import rosa_layers


def export_merged(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write the plain model with the adapter merged, of the base's own class and weight names.

    The model passed is left as it is, so this needs the memory of a second one. What was written is
    loaded back by the base's own class and compared, number by number.

    Args:
        model: a `PeftModel` with ROSA, wrapped or not.
        folder: where the model's files go.
        adapter_name: which adapter; the active one if None.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist; `folder` has a model already.
        ExportError: something else is loaded from it; then nothing is left in `folder`.
    """
    model, adapter = rosa_adapter(model, adapter_name)
    with staged(folder) as place:
        write_merged(model, adapter, place)


def write_merged(model: PeftModel, adapter: str, folder: Path) -> Any:
    """Write the merged model; raise ExportError if another is loaded from it, else return that.

    A model that has no `save_pretrained` is written as a state dict, and None is returned.
    """
    if quantized := [layer.name for _, layer in rosa_layers(model) if layer.is_quantized]:
        raise UserError(
            f"{quantized[0]} is quantized, and merging into it would round what was learned: load "
            "the adapter onto the model as it was before (PeftModel.from_pretrained of the whole "
            "model), and export that; or take the rounded one by model.merge_and_unload()"
        )
    merged = _merged(model, adapter)
    state = merged.state_dict()
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    expected = {name: _digest(tensor) for name, tensor in state.items()}
    if not hasattr(merged, "save_pretrained"):
        path = folder / "pytorch_model.bin"
        torch.save(state, path)
        del merged, state
        _check_merged(expected, torch.load(path, map_location="cpu", weights_only=True))
        return None
    plain: Any = type(merged)
    try:
        merged.save_pretrained(str(folder))
    except ValueError as error:  # such as generation settings that do not go together
        raise UserError(
            f"{plain.__name__}.save_pretrained refuses this model; nothing was written: {error}"
        ) from error
    how: dict[str, Any] = {}
    if isinstance(merged, PreTrainedModel) and dtypes:
        how["dtype"] = functools.reduce(torch.promote_types, dtypes)  # so that none is rounded
    attention = getattr(getattr(merged, "config", None), "_attn_implementation", None)
    if isinstance(merged, PreTrainedModel) and attention:
        how["attn_implementation"] = attention
    del merged, state  # no three models in memory at a time
    try:
        loaded = plain.from_pretrained(str(folder), **how)
    except Exception as error:
        raise ExportError(
            f"{plain.__name__}.from_pretrained cannot load what its save_pretrained wrote: "
            f"{type(error).__name__}: {error}. Nothing was written: use model.merge_and_unload(), "
            "and save the plain model in a way that its class can load"
        ) from error
    _check_merged(expected, loaded.state_dict())
    return loaded.eval()


Digest = tuple[torch.dtype, torch.Size, str]


def _digest(tensor: Tensor) -> Digest:
    """A tensor's dtype, shape, and a fingerprint of its numbers."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.dtype, tensor.shape, hashlib.blake2b(numbers.data).hexdigest()


def _check_merged(expected: dict[str, Digest], found: dict[str, Tensor]) -> None:
    differ = [
        name
        for name in sorted({*expected, *found})
        if name not in expected
        or name not in found
        # It may be loaded in a wider dtype, which holds the same numbers.
        or _digest(found[name].to(expected[name][0])) != expected[name]
    ]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ExportError(
            f"the merged model is not loaded as it was saved: {', '.join(differ[:5])}{more} "
            "differ. Nothing was written; this model's class does not give its own weights back: "
            "use model.merge_and_unload(), and save that in another way"
        )


def _merged(model: PeftModel, adapter: str) -> Any:
    """A plain copy of the model, with one adapter merged, whatever is in use."""
    merged: Any = _copy(model)
    merged.base_model.enable_adapter_layers()
    for _, layer in rosa_layers(merged):
        if layer.merged:  # maybe with other adapters
            layer.unmerge()
    merged.set_adapter(adapter)  # its head too
    return merged.merge_and_unload(safe_merge=True, adapter_names=[adapter]).requires_grad_(True)


def _copy(model: PeftModel) -> PeftModel:
    # Accelerate's mixed precision gives the model a forward of its own, which cannot be copied.
    forward = vars(model).get("forward")
    return copy.deepcopy(model, {} if forward is None else {id(forward): forward})
