"""A ROSA adapter in a smaller file, to be trained on, and the same or nearly so."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from rosa.algebra.lowrank import LowRank
from rosa.errors import ExportError
from rosa.export.checking import load_on_meta, same, without_weights
from rosa.export.ranks import ALL, Budget, changes_within
from rosa.export.staging import check_not_merged, rosa_adapter, staged
from rosa.layers.in_model import layers_of


def export_rosa(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Write a ROSA adapter with its whole change in the offset, compressed.

    So it has as many terms as the change has rank, and may be rounded, or cut to fewer, without
    harm to the part of the pretrained weight that factors else hold. Their product is zero: A is as
    it was and B is zero (with ``trained="A"`` the other way round); training goes on from there. A
    layer that this would make larger is written as it is, where nothing is cut or rounded.

    Args:
        model: a `PeftModel` with ROSA, wrapped or not; left as it is.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.
        adapter_name: which adapter; the active one if None.
        rank: keep so many terms of every weight's change; None for no such bound.
        energy: or keep this share of the changes' squared norms over all weights, by as few numbers
            as that takes.
        dtype: of the numbers in the file; None leaves them in their own.

    Returns:
        By layer, how much of the norm of its change was lost; 0 where it is exact.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist; `folder` has such files already;
            the rank, the energy or the dtype is none.
        ExportError: the file holds something else; then nothing is left in `folder`.
    """
    budget = Budget(rank, energy, dtype=dtype)
    model, adapter = rosa_adapter(model, adapter_name)
    check_not_merged(model, adapter)
    with staged(folder) as place:
        return write_rosa(model, adapter, place, budget)


def write_rosa(
    model: PeftModel, adapter: str, folder: Path, budget: Budget = ALL
) -> dict[str, float]:
    """Write an adapter within a budget, and raise ExportError if the file holds something else."""
    layers = layers_of(model, adapter)
    kept, errors = changes_within(budget, layers, adapter)
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    for name, layer in layers.items():
        one = layer.adapters[adapter]
        a, b = (factor.detach().cpu() for factor in one.factors)
        a, b = (torch.zeros_like(a), b) if one.config.trained == "A" else (a, torch.zeros_like(b))
        offset = kept[name]
        if one.drawn() is not None:  # the last terms are what was drawn: nothing of the weight
            offset = offset + LowRank(-b.to(offset.dtype), a.to(offset.dtype))
        if budget.is_all and offset.rank > state[f"{name}.rosa_offset.A"].shape[-2]:
            continue  # a short training's is as short as it can be
        for key, value in (
            *(("rosa_A", a), ("rosa_B", b)),
            *(("rosa_offset.A", offset.A), ("rosa_offset.B", offset.B)),
        ):
            state[f"{name}.{key}"] = value.to(budget.dtype)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    _check_rosa(model, adapter, kept, folder)
    return errors


def _check_rosa(model: PeftModel, adapter: str, kept: dict[str, LowRank], folder: Path) -> None:
    """Load a written adapter as PEFT does, onto a model without weights; compare the changes."""
    with torch.random.fork_rng(devices=[]):
        loaded = load_on_meta(without_weights(model.base_model.model), folder)  # type: ignore[arg-type]
    found = layers_of(loaded, "default")
    names = [
        layer.name
        for name, layer in layers_of(model, adapter).items()
        if name not in found or not same(kept[name], found[name].whole_change("default"))
    ]
    if names:
        raise ExportError(
            f"PEFT loads something else for {', '.join(names[:5])} than was written. Nothing was "
            "left of it; please report this"
        )
