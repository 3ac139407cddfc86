"""Which modules a config names, as PEFT matches names."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel

from rosa.config import RosaConfig, as_rosa_config
from rosa.kinds.linear import RosaLinear
from rosa.kinds.parameter import ParamWrapper
from rosa.kinds.registry import kind_of
from rosa.layers.in_model import base_of, plain_name, rosa_layers
from rosa.targeting.held import held_elsewhere
from rosa.targeting.names import COMPILED

# The heads that PEFT's classes for a task train in full; some add them to the config only once the
# layers have been replaced.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def is_target(config: RosaConfig, name: str) -> bool | re.Match[str] | None:
    """PEFT's matching of names, less the modules that are trained in full anyway."""
    if is_trained_in_full(config, name):
        return _ExcludedModule()  # type: ignore[return-value]
    return BaseTuner._check_target_module_exists(config, name)


def names_parameter(wanted: Iterable[str], key: str) -> bool:
    """Whether one of `target_parameters` names a parameter of the model, as PEFT matches them."""
    return any(key == name or key.endswith(f".{name}") for name in wanted)


def resolve_all_linear(config: RosaConfig, model: nn.Module) -> None:
    """Let `target_modules="all-linear"` be the names of the layers that can be adapted."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    model = getattr(model, COMPILED.rstrip("."), model)
    found = as_rosa_config(
        _maybe_include_all_linear_layers(copy.copy(config), model)
    ).target_modules
    # PEFT looks for no layers inside those that another adapter is in.
    wholes = {n for n, layer in rosa_layers(model) if layer.inner(layer.get_base_layer())}
    found = {*(found or ()), *wholes}
    names = {_whole(model, n) for n in found if not is_trained_in_full(config, n)}
    if not names:
        return
    modules = {n: model.get_submodule(n) for n in names}
    others = {n for n, module in modules.items() if not _is_plain(module)}
    others |= held_elsewhere(model, modules.items()).keys()
    # PEFT looks at names alone: with such a head it saves the embeddings too, and fails there.
    others |= {n for n in names if n in EMBEDDING_LAYER_NAMES and not has_embeddings(model)}
    config.target_modules = list(names - others)
    if others := others | set(_out_of_reach(model)):
        warnings.warn(
            f"all-linear leaves out {', '.join(sorted(others)[:5])}: of a class that computes or "
            "is read otherwise than a linear layer, a head that PEFT cannot save as one, held in a "
            "list that torch does not look into, or in a module of which another adapter adapts a "
            "parameter",
            stacklevel=2,
        )


def _whole(model: nn.Module, name: str) -> str:
    """The name of the module that a linear layer is adapted with, or its own."""
    parent, _, child = plain_name(name).rpartition(".")
    base = base_of(model.get_submodule(parent))
    kind = kind_of(base)
    return name if kind is None or child not in kind.inner(base) else parent


def _out_of_reach(model: nn.Module) -> Iterator[str]:
    """Linear layers inside modules that carry an adapter of a parameter, where PEFT finds none."""
    for name, layer in rosa_layers(model):
        if type(layer) is ParamWrapper:
            bare, base = plain_name(name), layer.get_base_layer()
            inside = ((n, kind_of(m)) for n, m in base.named_modules() if n)
            yield from (f"{bare}.{n}" for n, kind in inside if kind is RosaLinear)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its kind of layer does; others are refused by name."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = kind_of(base)
    return kind is None or kind.is_plain(base)


def has_embeddings(model: nn.Module) -> bool:
    """Whether PEFT could save the model's embeddings beside an adapted head."""
    if not isinstance(model, PreTrainedModel):
        return True
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        return False
    return True


def is_trained_in_full(config: RosaConfig, name: str) -> bool:
    """Whether PEFT trains this module, or one that it lies in, in full: then it is not adapted.

    By the endings that PEFT goes by: `classifier` is `pre_classifier` too.
    """
    heads = (*(config.modules_to_save or ()), *_HEADS.get(config.task_type or "", ()))
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(heads) for i in range(len(parts)))
