"""A plain model with an adapter merged, whose weights are computed when they are asked for.

So a model is merged that is as large as the memory, or, with weights mapped from its files, larger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper, load_peft_weights
from torch import Tensor, nn

from rosa.algebra import fingerprints
from rosa.config import as_rosa_config
from rosa.errors import UserError
from rosa.export.checking import load_on_meta
from rosa.files.checkpoint import warn_of_another_base
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import layers_of, plain_name, rosa_layers
from rosa.pretrained.weight import with_change

Weights = Mapping[str, Callable[[], Tensor]]
"""The weights of a plain model that are on the meta device, by name: what each is."""


def merged_lazily(model: PeftModel, adapter: str) -> tuple[Any, Weights]:
    """A plain model with an adapter merged, and its weights that this changes; `model` is left.

    Weights that the adapter leaves alone are the model's own memory.

    Args:
        model: with any PEFT method; only ROSA's weights wait, another's are merged in a copy.
        adapter: its name.
    """
    weights = {
        _plain(f"{name}.{layer.weight_path}"): (
            partial(_merged, layer, adapter, layer.pretrained_as_stored)
            if adapter in layer.adapters
            else layer.pretrained_as_stored
        )
        for name, layer in rosa_layers(model)
    }
    _check_tokens_apart(model, adapter)
    return _unloaded(_copy(model), adapter), weights


def mapped_lazily(base: nn.Module, folder: Path) -> tuple[Any, Weights]:
    """The same of a ROSA adapter's folder, on a base that is never changed nor copied.

    Args:
        base: the plain base model. Transformers maps its weights from their files where they lie on
            the CPU in the files' own precision, and then little of it is in memory at a time.
        folder: the adapter's.

    Raises:
        ValueError, RuntimeError: the adapter does not fit the base.
    """
    pretrained = base.state_dict()
    model = load_on_meta(base, folder)
    adapter = model.active_adapters[0]
    _check_tokens_apart(model, adapter)
    weights: dict[str, Callable[[], Tensor]] = {}
    layers = layers_of(model, adapter)
    for name, layer in layers.items():
        key = _plain(f"{name}.{layer.weight_path}")
        matrix = layer.base_weight.view.as_matrix(pretrained[key])
        layer.base_weight.recall(fingerprints.fingerprint(matrix))
        weights[key] = partial(_merged, layer, adapter, partial(pretrained.__getitem__, key))
    tokens = {n: m for n, m in model.named_modules() if isinstance(m, TrainableTokensWrapper)}
    if tokens:  # the file's rows, which PEFT has moved to where the embedding is: the meta device
        rows = load_peft_weights(str(folder), device="cpu")
        owners = {module.token_adapter: name for name, module in tokens.items()}
        for name, module in tokens.items():
            own = module.token_adapter
            held = f"{owners[own.tied_adapter or own]}.token_adapter.trainable_tokens_delta"
            key, indices = _plain(f"{name}.weight"), own.token_indices[adapter]
            whole = partial(pretrained.__getitem__, key)
            weights[key] = partial(_with_rows, whole, indices, rows[held])
    warn_of_another_base(as_rosa_config(model.peft_config[adapter]).base_fingerprint, layers)
    plain = _unloaded(model, adapter)
    for name, tensor in plain.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_meta and name not in weights:
            weights[name] = partial(pretrained.__getitem__, name)
    return plain, weights


def _check_tokens_apart(model: PeftModel, adapter: str) -> None:
    """Raise UserError where tied weights have trained tokens of their own: a plain model has one.

    PEFT would merge one side's tokens into both.
    """
    sides: dict[int, str] = {}
    for name, module in model.named_modules():
        own = module.token_adapter if isinstance(module, TrainableTokensWrapper) else None
        if own is None or own.tied_adapter is not None or adapter not in own.token_indices:
            continue
        weight = own.get_base_layer().weight
        if (other := sides.setdefault(id(weight), name)) != name:
            one, two = (_plain(f"{n}.")[:-1] for n in (other, name))
            raise UserError(
                f"{one} and {two} are tied, and each has trained tokens of its own "
                "(trainable_token_indices): a plain model has one weight for both. Untie them "
                "(tie_word_embeddings=False), or train the same tokens on both"
            )


def _plain(key: str) -> str:
    """The name of a weight in the plain model."""
    return plain_name(key.removeprefix("base_model.model."))


@torch.no_grad()
def _merged(layer: RosaLayer, adapter: str, pretrained: Callable[[], Tensor]) -> Tensor:
    """A weight with the adapter's whole change, as it is stored."""
    view = layer.base_weight.view
    total = with_change(view.as_matrix(pretrained()), layer.whole_change(adapter))
    if not total.isfinite().all():
        raise UserError(
            f"the merged weight of layer {layer.name} has NaN or infinity: the adapter seems to be "
            "broken, or its change does not fit the weight's precision. Load an earlier checkpoint"
        )
    return view.as_stored(total).contiguous()


def _with_rows(pretrained: Callable[[], Tensor], indices: list[int], rows: Tensor) -> Tensor:
    """An embedding's weight with some of its rows trained."""
    weight = pretrained()
    return weight.index_copy(0, torch.tensor(indices), rows.to(weight))


def _unloaded(model: PeftModel, adapter: str) -> Any:
    """A plain model of a copy, with one adapter merged, whatever is in use."""
    tuner: Any = model.base_model
    tuner.enable_adapter_layers()
    for _, layer in rosa_layers(model):
        if layer.merged:  # maybe with other adapters
            layer.unmerge()
    model.set_adapter(adapter)  # its head too
    rosa = any(True for _ in rosa_layers(model))  # whose weights are looked at when they are there
    plain = tuner.merge_and_unload(safe_merge=not rosa, adapter_names=[adapter])
    return plain.requires_grad_(True)


def _copy(model: PeftModel) -> PeftModel:
    """A copy whose adapted weights take no memory; it shares all that no method of PEFT changes."""
    memo: dict[int, Any] = {}
    # Accelerate's mixed precision gives the model a forward of its own, which cannot be copied.
    if (forward := vars(model).get("forward")) is not None:
        memo[id(forward)] = forward
    changed = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        and not isinstance(module, RosaLayer)
    )
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and not name.startswith(changed):
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for name, buffer in model.named_buffers():
        if not name.startswith(changed):
            memo[id(buffer)] = buffer
    for _, layer in rosa_layers(model):
        weight = layer.base_weight.parameter
        memo[id(weight)] = nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
        memo[id(layer.base_weight.kept)] = None
        terms = (*layer.base_weight.standing.values(), *(a.terms for a in layer.adapters.values()))
        memo.update({id(each): each for each in terms})
    return copy.deepcopy(model, memo)
