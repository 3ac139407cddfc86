"""What is trained beside the adapted layers: whole modules, rows of embeddings, statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.kinds.registry import kind_of
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import base_of, rosa_layers
from rosa.targeting.matching import is_target, is_trained_in_full


def check_full_training(config: RosaConfig, model: nn.Module) -> None:
    """Raise ValueError if an adapter is to train modules in full that another one adapts."""
    found = [name for name, _ in rosa_layers(model) if is_trained_in_full(config, name)]
    if found:
        raise UserError(
            f"{', '.join(found[:5])} would be trained in full (modules_to_save, or the head of "
            f"task_type={config.task_type}), but another adapter adapts that layer: delete_adapter "
            "the other first, or leave the module out of modules_to_save"
        )


def check_tokens(config: RosaConfig, model: nn.Module, others: Mapping[str, PeftConfig]) -> None:
    """Raise ValueError unless the tokens to be trained are rows of embeddings left unadapted.

    All adapters of a model are to train rows of the same embeddings: PEFT does not save one that
    does not, beside one that does.
    """
    named = _tokens_of(config, model)
    for name, other in others.items():
        theirs = _tokens_of(other, model).keys()
        if isinstance(other, RosaConfig) and theirs != named.keys():
            raise UserError(
                "trainable_token_indices must be of the same embeddings for all adapters of a "
                f"model: {name!r} trains tokens of {', '.join(sorted(theirs)) or 'none'}, the new "
                f"one of {', '.join(sorted(named)) or 'none'}. Delete the other adapter first, or "
                "load each onto a model of its own"
            )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tokens in named.items():
        full = is_trained_in_full(config, name)
        if full or isinstance(modules[name], RosaLayer) or is_target(config, name):
            raise UserError(
                f"trainable_token_indices: {name} would be {'trained' if full else 'adapted'} as "
                "well: train some of its rows or all of it, and leave it out of target_modules and "
                "modules_to_save, or its tokens out here"
            )
        if max(tokens, default=0) >= (rows := _plain_of(modules[name]).weight.shape[0]):  # type: ignore[index]
            raise UserError(
                f"trainable_token_indices: {name} has {rows} rows, and none for token "
                f"{max(tokens)}: resize_token_embeddings first"
            )


def _tokens_of(config: PeftConfig, model: nn.Module) -> dict[str, list[int]]:
    """The tokens that an adapter trains, by the embedding's name in the model."""
    named = getattr(config, "trainable_token_indices", None)
    if named is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(named, dict):
        inputs: Any = getattr(model, "get_input_embeddings", lambda: None)()
        names = [name for name, module in modules.items() if module is inputs]
        named = {names[0] if names else "embed_tokens": named}
    wrapped = tuple(f"{n}." for n, m in modules.items() if isinstance(m, AuxiliaryTrainingWrapper))
    tokens = {}
    for wanted, indices in named.items():
        found = [
            name
            for name, module in modules.items()
            if name.endswith(wanted) and not name.startswith(wrapped)
            if isinstance(_plain_of(module), (nn.Embedding, nn.Linear))
        ]
        if not found:
            raise UserError(
                f"trainable_token_indices: the model has no embedding {wanted!r}; give "
                "{the embedding's name: tokens}"
            )
        tokens.update(dict.fromkeys(found, indices))
    return tokens


def _plain_of(module: nn.Module) -> nn.Module:
    """A module without what PEFT has put around it."""
    while isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return base_of(module)


def warn_of_statistics(config: RosaConfig, model: nn.Module) -> None:
    """Warn of norms whose running statistics training will change, and no adapter's file holds."""
    if config.inference_mode:
        return
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats
        if not is_trained_in_full(config, name)
    ]
    if names:
        warnings.warn(
            f"{len(names)} norms such as {names[0]} keep running statistics, which change in train "
            "mode and are in no adapter's file: put them in eval mode while you train, or name "
            "them in modules_to_save",
            stacklevel=5,
        )


def all_in_full(config: RosaConfig, model: nn.Module) -> str:
    """Says so if all that was named to be adapted is trained in full; else empty."""
    bare = copy.copy(config)
    bare.modules_to_save = bare.task_type = None
    names = [n for n, m in model.named_modules() if kind_of(m)]
    full = [n for n in names if is_target(bare, n) and is_trained_in_full(config, n)]
    if not full:
        return ""
    return (
        f"nothing is left to adapt: all that target_modules names ({', '.join(full[:5])}) is "
        f"trained in full already, by modules_to_save or as the head of task_type="
        f"{config.task_type}. Name layers inside the model, such as "
        "target_modules='all-linear', or take those names out of modules_to_save"
    )
