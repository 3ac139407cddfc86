"""What an adapter's file holds, and the checks of one before anything is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rosa.algebra.fingerprints import same_fingerprint
from rosa.algebra.lowrank import are_finite
from rosa.errors import UserError, shown
from rosa.layers.base import RosaLayer
from rosa.layers.statedict import PARTS
from rosa.pretrained.sharding import whole
from rosa.pretrained.weight import SUPPORTED_DTYPES
from rosa.pretrained.zero3 import is_in_part, shape_of

_FLOATS = {str(dtype) for dtype in SUPPORTED_DTYPES}
_COUNTS = (torch.int64, torch.int32)
_QUANTIZED = 0.7
"""How far apart, over the weight's norm, the fingerprints of a weight and the quantized one may be.
Rounded to four bits a weight is a tenth of its norm away, and by that its projection spreads: of a
model's hundreds of weights some are four times as far."""


def is_rosa_key(key: str) -> bool:
    """Whether a key of a state dict is of a factor or an offset (not of a head called rosa_...)."""
    return re.search(r"\.rosa_(A|B|offset)(\.|$)", key) is not None


def state_keys(layer_name: str, adapter_name: str) -> list[str]:
    """The keys of a layer's adapter in the model's state dict."""
    prefix = f"{layer_name}." if layer_name else ""
    return [prefix + part.format(adapter_name) for part in PARTS]


def fill_in(
    model: nn.Module,
    layers: dict[str, RosaLayer],
    adapter_name: str,
    beside: Iterable[str],
    found: dict[str, torch.Tensor],
    state_dict: dict[str, torch.Tensor],
) -> None:
    """Of a model in ZeRO 3, let what is saved hold what its state dict does not.

    The model's own has empty tensors where it has parameters: all processes must ask for those.
    DeepSpeed's has them whole, for one process, and nothing but parameters and buffers.

    Args:
        model: whose state dict it is.
        layers: with the adapter, by name.
        adapter_name: the adapter's.
        beside: what of the state dict may be saved beside the adapter.
        found: the adapter, from the state dict.
        state_dict: of the model.
    """
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if is_in_part(p)}
    for content, keys in ((found, list(found)), (state_dict, beside)):
        for key in keys:
            parameter = parameters.get(key)
            if parameter is not None and content[key].shape != shape_of(parameter):
                content[key] = whole(parameter)
    for name, layer in layers.items() if parameters else ():
        offsets = layer.rosa_offset.state_dict(prefix=f"{name}.rosa_offset.")
        keys = state_keys(name, adapter_name)
        wanted = offsets.keys() & set(keys) - found.keys()
        found |= {key: offsets[key] for key in wanted}
        stayed = layer.adapters[adapter_name].stayed()
        for key, factor in zip(keys, layer.adapters[adapter_name].factors, strict=False):
            if stayed is not None and factor is stayed[0]:  # it may have been left out
                found.setdefault(key, stayed[1])


def check_adapter_file(
    layers: dict[str, RosaLayer], adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless a state dict holds exactly these layers' adapter."""
    expected = {key for name in layers for key in state_keys(name, adapter_name)}
    found = {key for key in state_dict if is_rosa_key(key)}
    if not found:
        example = shown(next(iter(state_dict), "nothing"), 200)
        raise UserError(
            f"this is not a ROSA adapter: its file holds no rosa_ weights (but {example}). "
            "Check the folder, or load it with the config of the method that wrote it"
        )
    missing, foreign = sorted(expected - found), sorted(found - expected)
    if missing or foreign:
        raise UserError(
            "the adapter file does not fit this model: "
            + (f"it lacks {len(missing)} tensors, such as {missing[0]}; " if missing else "")
            + (
                f"{len(foreign)} of its tensors have no place, such as {shown(foreign[0], 200)}; "
                if foreign
                else ""
            )
            + "it is incomplete, or belongs to another base model or other target_modules"
        )
    wrong = []
    for name, layer in layers.items():
        a, b, offset_a, offset_b, draws = (state_dict[k] for k in state_keys(name, adapter_name))
        expected_a, expected_b = (tuple(f.shape) for f in layer.adapters[adapter_name].factors)
        terms = offset_b.shape[-1:]
        if odd := {str(t.dtype) for t in (a, b, offset_a, offset_b)} - _FLOATS:
            wrong.append(f"{name}: {', '.join(sorted(odd))} instead of numbers in floating point")
        elif tuple(a.shape) != expected_a or tuple(b.shape) != expected_b:
            wrong.append(
                f"{name}: file A {tuple(a.shape)}, B {tuple(b.shape)}, "
                f"model A {expected_a}, B {expected_b}"
            )
        elif offset_a.shape != (*expected_a[:-2], *terms, expected_a[-1]) or offset_b.shape != (
            *expected_b[:-1],
            *terms,
        ):
            wrong.append(f"{name}: the offset's shapes do not fit each other or the weight")
        elif not are_finite([a, b, offset_a, offset_b]):
            wrong.append(f"{name}: NaN or infinity")
        elif draws.numel() != 1 or draws.dtype not in _COUNTS or int(draws) < 0:
            wrong.append(f"{name}: the count of draws is not a number")
    if wrong:
        raise UserError(
            f"the adapter does not fit the model in {len(wrong)} of {len(layers)} layers: "
            + "; ".join(wrong[:3])
            + ". Load it on the base model and with the config that it was trained with"
        )


def fingerprints_of(layers: dict[str, RosaLayer]) -> dict[str, Any]:
    """What tells the base weights that an adapter belongs to: see `RosaConfig.base_fingerprint`."""
    found = {layer.name: layer.base_fingerprint() for layer in layers.values()}
    dtypes = {
        "quantized" if layer.is_quantized else str(layer.base_weight.stored_dtype)
        for layer in layers.values()
    }
    return {
        "dtypes": sorted(dtype.removeprefix("torch.") for dtype in dtypes),
        "layers": {name: list(value) for name, value in found.items() if value is not None},
    }


def warn_of_another_base(saved: dict[str, Any] | None, layers: dict[str, RosaLayer]) -> None:
    """Warn if the layers' base weights are others than those that an adapter was saved with."""
    if not saved:
        return
    here = fingerprints_of(layers)
    eps = 0.0
    if saved["dtypes"] != here["dtypes"]:  # one of them was rounded
        dtypes = {*saved["dtypes"], *here["dtypes"]}
        eps = max(
            _QUANTIZED if name == "quantized" else torch.finfo(getattr(torch, name)).eps
            for name in dtypes
        )
    differ = [
        name
        for name, value in here["layers"].items()
        if name in saved["layers"]
        and not same_fingerprint(tuple(value), tuple(saved["layers"][name]), eps)
    ]
    if differ:
        warnings.warn(
            f"this adapter was trained on other base weights: {len(differ)} of {len(layers)} "
            f"layers differ ({', '.join(differ[:5])}{', ...' if len(differ) > 5 else ''}). It will "
            "not give the model that was trained: load the base model that it was made from",
            stacklevel=2,
        )
