"""A weighted sum of adapters, as an adapter."""

from __future__ import annotations

import copy
import math
import re

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper

from rosa.algebra.lowrank import LowRank, are_finite
from rosa.config import RosaConfig, as_rosa_config
from rosa.errors import UserError
from rosa.kinds.parameter import ParamWrapper
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import layers_of


def check_weighted(
    model: BaseTuner, adapters: list[str], weights: list[float], name: str, kind: str
) -> None:
    """Raise ValueError unless `RosaModel.add_weighted_adapter` can do with these."""
    there = list(model.peft_config)
    if kind not in ("linear", "cat"):
        raise UserError(
            f"combination_type must be 'linear' or 'cat', got {kind!r}: ROSA's sums are exact, and "
            "their rank is what it is"
        )
    if isinstance(adapters, str) or not adapters:
        raise UserError(
            f"adapters must be a list of names, of {', '.join(there)}; got {adapters!r}"
        )
    if len(adapters) != len(weights):
        raise UserError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"weights must be finite numbers, got {weights}")
    if name in there:
        raise UserError(f"the model already has an adapter {name!r}: choose another adapter_name")
    if unknown := [adapter for adapter in adapters if adapter not in there]:
        raise UserError(f"the model has no adapter {unknown[0]!r}; it has {', '.join(there)}")
    for adapter in adapters:
        config = model.peft_config[adapter]
        if not isinstance(config, RosaConfig):
            raise UserError(f"{adapter!r} is not a ROSA adapter: it cannot be a part of the sum")
        for layer in layers_of(model.model, adapter).values():
            factors = [factor.detach() for factor in layer.adapters[adapter].factors]
            if factors[0].is_meta or not are_finite(factors):
                raise UserError(
                    f"the factors of {adapter!r} in layer {layer.name} are not in memory, or not "
                    "finite: load its file first"
                )
        wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        if (
            config.modules_to_save
            or config.trainable_token_indices is not None
            or any(adapter in wrapper._get_available_adapters() for wrapper in wrappers)
        ):
            raise UserError(
                f"{adapter!r} trains modules or tokens besides (modules_to_save, "
                "trainable_token_indices), which are not summed: give adapters without them"
            )


def weighted_config(
    model: BaseTuner, adapters: list[str], layers: dict[str, RosaLayer]
) -> RosaConfig:
    """The first one's, for all of the layers, each with its largest rank."""
    configs = [as_rosa_config(model.peft_config[adapter]) for adapter in adapters]
    config = copy.deepcopy(configs[0])
    config.r = max(each.r for each in configs)
    config.inference_mode = False
    inner = {
        f"{layer.name}.{child}"
        for layer in layers.values()
        for child in layer.inner(layer.get_base_layer())
    }
    # A parameter's layer is known by the parameter; what lies inside another goes with that.
    named = {
        layer.name if type(layer) is ParamWrapper else name: layer
        for name, layer in layers.items()
        if layer.name not in inner
    }
    ranks = {
        name: max(layer.adapters[each].r for each in adapters if each in layer.adapters)
        for name, layer in named.items()
    }
    config.rank_pattern = {
        f"^{re.escape(name)}": rank
        for name, rank in ranks.items()
        if rank != min(config.r, named[name].in_features, named[name].out_features)
    }
    if layers.keys() != layers_of(model.model, adapters[0]).keys():
        modules = [name for name, layer in named.items() if type(layer) is not ParamWrapper]
        parameters = [name for name, layer in named.items() if type(layer) is ParamWrapper]
        config.target_modules = "|".join(map(re.escape, modules)) or []
        # All adapters with parameters have the same, under the names that they were given.
        given = (each.target_parameters for each in configs if each.target_parameters)
        config.target_parameters = next(given) if parameters else None
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def put_sum(
    layers: dict[str, RosaLayer], adapters: list[str], weights: list[float], name: str
) -> None:
    """Let the offsets of a fresh adapter hold the sum of others' changes less what was drawn."""
    for layer in layers.values():
        one = layer.adapters[name]
        for factor in one.factors:
            factor.requires_grad_(False)
        total = LowRank.zero(one.shape, one.terms.dtype)
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter in layer.adapters:
                change = layer.whole_change(adapter)
                total = total + LowRank(change.B * weight, change.A)
        if total.rank > min(one.shape[-2:]):
            total = total.compressed()
        one.terms = (total + one.terms).joined()
