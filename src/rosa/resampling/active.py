"""The active adapters of a model, and whether their subspaces can be drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from rosa.algebra.lowrank import are_finite
from rosa.errors import UserError, UserTypeError
from rosa.layers.adapter import Adapter
from rosa.layers.base import RosaLayer
from rosa.layers.drawing import Factors
from rosa.layers.in_model import rosa_layers
from rosa.pretrained import zero3
from rosa.pretrained.files import WeightFile
from rosa.pretrained.sharding import (
    check_shards,
    cut_dim,
    from_first,
    is_cut,
    is_dtensor,
    is_fully_sharded,
    is_sharded,
    own_part,
    reshard,
)
from rosa.resampling.optimizers import check_optimizer
from rosa.resampling.zero import partitioned


@dataclass(frozen=True)
class Active:
    """An adapter that is in use in a layer.

    Attributes:
        name: the layer's, in the model.
        layer: the layer.
        adapter: the adapter there.
    """

    name: str
    layer: RosaLayer
    adapter: Adapter

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.adapter.factors

    @property
    def is_informed(self) -> bool:
        """Whether it draws where the gradient lies."""
        return self.adapter.config.is_informed

    def watch(self) -> None:
        """Begin to look where the gradient lies."""
        self.layer.watch(self.adapter.name)

    def draw(self) -> Factors:
        """New factors for it; it stays as it is."""
        return self.layer.draw(self.adapter.name)

    def lend(self) -> None:
        """Help another process to draw: it needs what of the layer is here."""
        if any(map(is_sharded, (self.layer.base_weight.parameter, *self.factors))):
            self.layer.whole(self.adapter.name)

    def resample(self, drawn: Factors) -> None:
        """Drop the factors' gradients, merge, and go on with new factors."""
        for factor in self.factors:
            factor.grad = None
        self.layer.resample(self.adapter.name, drawn)


def factors_of(found: list[Active]) -> list[nn.Parameter]:
    """The factors of all."""
    return [factor for active in found for factor in active.factors]


def active_adapters(model: nn.Module, optimizer: Any = None) -> list[Active]:
    """What a resample would draw; raises as `resample` does."""
    if not isinstance(model, nn.Module):
        raise UserTypeError(
            f"expected a model (torch.nn.Module), got {type(model).__name__}: rosa.resample takes "
            "the model first and then the optimizer; a trainer of another kind of model has no "
            "place for RosaCallback: call rosa.resample on the module inside it in a callback of "
            "its own"
        )
    layers = list(rosa_layers(model))
    check_shards(model)
    reshard(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no ROSA layers: attach them with "
            "peft.get_peft_model(model, rosa.RosaConfig(...))"
        )
    in_rows = is_fully_sharded(model)
    for name, layer in layers:
        _check_layer(name, layer, in_rows)
    found = [
        Active(name, layer, adapter) for name, layer in layers for adapter in layer.adapters_in_use
    ]
    for active in found:
        _check_factors(active, in_rows)
    if not found:
        raise UserError(
            f"no ROSA adapter is active (active: {layers[0][1].active_adapters}): call "
            "model.set_adapter(name) first"
        )
    if optimizer is not None:
        named = {factor: active.name for active in found for factor in active.factors}
        learn = {factor: name for factor, name in named.items() if factor.requires_grad}
        fixed = {f: named[f] for f in named if f not in learn}
        in_parts = {number for part in partitioned(optimizer) for number in part.held()}
        check_optimizer(optimizer, learn, fixed, in_parts)
    return found


def _check_layer(name: str, layer: RosaLayer, in_rows: bool) -> None:
    if layer.merged:
        raise UserError(f"layer {name} is merged: call model.unmerge_adapter() before you resample")
    if layer.disable_adapters:
        raise UserError(
            f"layer {name} has its adapters disabled: leave model.disable_adapter(), or call "
            "model.base_model.enable_adapter_layers(), before you resample"
        )
    base = layer.base_weight
    in_parts = zero3.is_in_part(base.parameter)
    if in_parts:
        layer.check_parts()
        zero3.check_part(base.parameter)
    known = is_cut(base.parameter) if layer.is_in_shards else in_rows
    in_shards = base.shard is not None and known
    if not (base.is_whole or in_parts or in_shards):
        raise UserError(
            f"the weight of layer {name} is offloaded or sharded over processes: ROSA draws "
            "from whole weights, so train data-parallel without sharding or offloading, with "
            "torch's fully_shard (FSDP 2) alone, or with DeepSpeed's ZeRO; tensor parallelism "
            "comes before get_peft_model"
        )
    if isinstance(file := layer.base_weight.kept, WeightFile):
        file.check()


def _check_factors(active: Active, in_rows: bool) -> None:
    if active.adapter.is_on_meta:
        raise UserError(
            f"the factors of layer {active.name} are on the meta device (low_cpu_mem_usage): load "
            "the adapter's file first, or attach it without low_cpu_mem_usage"
        )
    *stack, out_features, in_features = active.adapter.shape
    times = math.prod(stack) * active.adapter.r
    numbers = times * in_features, times * out_features
    in_shards = active.layer.is_in_shards
    known = [
        (in_rows and cut_dim(factor) == 0) or in_shards or zero3.is_in_part(factor)
        for factor in active.factors
    ]
    sharded = any(is_sharded(f) and not k for f, k in zip(active.factors, known, strict=True))
    if sharded or numbers != tuple(zero3.shape_of(factor).numel() for factor in active.factors):
        raise UserError(
            f"the factors of layer {active.name} are sharded over processes: train data-parallel "
            "without sharding, with torch's fully_shard (FSDP 2) alone, or with DeepSpeed's ZeRO"
        )


REPLICAS = 1e-3
"""By how much of its norm a factor may differ between processes that all hold it: by rounding."""


def check_replicas(found: list[Active]) -> None:
    """Raise ValueError if a factor that is whole beside a cut weight differs by process.

    All processes must ask for it.
    """
    differ = []
    for active in found:
        weight = active.layer.base_weight.parameter
        for factor in active.factors if is_dtensor(weight) else ():
            if cut_dim(factor) is None:
                mine = own_part(factor).detach()
                first = from_first(mine.clone(), like=weight)
                if float((mine - first).norm()) > REPLICAS * float(first.norm()):
                    differ.append(active.name)
    if differ:
        raise UserError(
            f"copies of factors of {len(differ)} layers, such as {differ[0]}, have drifted apart "
            "in the processes, which train one model together: something changes them in some "
            "processes alone. Go back to a checkpoint"
        )


def check_finite(found: list[Active]) -> None:
    """Raise ValueError if a factor has NaN or infinity."""
    if are_finite([own_part(factor).detach() for factor in factors_of(found)]):
        return
    for active in found:
        if not are_finite([own_part(factor).detach() for factor in active.factors]):
            raise UserError(
                f"a factor of layer {active.name} has NaN or infinity: the training has diverged. "
                "Go back to a checkpoint and lower the learning rate"
            )
