"""When and how a model's subspaces are drawn again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from rosa.algebra.lowrank import are_finite
from rosa.errors import UserError
from rosa.layers.linear import RosaLinear, rosa_layers
from rosa.layers.sharding import check_unsharded, is_sharded
from rosa.resampling.moments import check_moments, clear
from rosa.resampling.optimizers import State, averages, check_optimizer, forget_curvature, states_of


def watch(model: nn.Module) -> int:
    """Begin to look where the loss falls, for the next draw with ``directions="gradient"``.

    From now on every ordinary backward pass adds a projection of each weight's loss gradient to a
    small sum (`algebra.sketch`), until the next `resample` draws from it. A few steps are enough;
    each costs, while it is watched, about what a LoRA of rank r + 8 would add.

    Returns:
        The number of weights that are watched: those of active adapters with that setting, whose
        draws are informed.

    Raises:
        ValueError: as `resample` does.
    """
    jobs = [job for job in check(model) if is_informed(job)]
    for _, layer, adapter in jobs:
        layer.watch(adapter)
    return len(jobs)


def resample(
    model: nn.Module,
    optimizer: Any = None,
    *,
    moments: str = "clear",
    batches: Iterable[Any] = (),
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> int:
    """Merge what the active adapters have learned and draw new subspaces, layer by layer.

    The model's outputs stay the same to rounding. The factors stay the same Parameter objects;
    their gradients are dropped, and their entries in the optimizer's state are cleared, step counts
    too, unless `moments` says otherwise. Everything else that the optimizer holds, its
    parameter groups and the learning-rate schedule are left alone. Call it between an optimizer
    step and the next forward pass. The extra memory is one layer's at a time.

    Args:
        model: a model with ROSA layers, wrapped or not.
        optimizer: the optimizer that trains it: torch's, one of another library that keeps its
            state as torch's do, any wrapper of it, or a list or dict of several. One that keeps
            copies of the factors (DeepSpeed, master weights, offloading) is refused. None if the
            model is not being trained.
        moments: what becomes of the optimizer's moments of the factors, which belong to the old
            subspace: ``"clear"`` begins anew, ``"keep"`` goes on with them as they are. A
            schedule-free optimizer needs ``"clear"``: its average goes on from where the factors
            are.
        batches: for draws by the gradient, batches to find it with, instead of what was seen since
            `watch`; about four. All other parameters' gradients stay as they are,
            and so does the model's mode: in eval mode the gradient is found without dropout.
        loss: takes the model and a batch and returns the loss; None is ``model(**batch).loss``.

    Returns:
        The number of weights whose subspace was drawn.

    Raises:
        ValueError: the model has no ROSA, or is merged or disabled; a factor is NaN; the optimizer
            does not hold the factors, or keeps copies of them, or holds what cannot be kept; the
            weights are sharded or offloaded; a batch gives no loss. Nothing has been changed then.
    """
    jobs = check(model, optimizer)
    informed = [job for job in jobs if is_informed(job)]
    states = check_state(moments, optimizer, jobs)
    _check_finite(jobs)
    if batches and informed:
        look(model, informed, batches, loss)
    _agree(informed)
    _warn_of_blind(informed)
    for _, layer, adapter in jobs:
        layer.resample(adapter)
        factors = factors_of(layer, adapter)
        for factor in factors:
            factor.grad = None
        if moments == "clear":
            for state in states:
                clear(state, factors)
    if moments == "clear":
        forget_curvature(optimizer)
    torch.clear_autocast_cache()  # else an autocast around the call would go on with old factors
    return len(jobs)


Job = tuple[str, RosaLinear, str]


def is_informed(job: Job) -> bool:
    """Whether a layer's adapter draws where the gradient lies."""
    _, layer, adapter = job
    return layer.rosa_config[adapter].is_informed


def factors_of(layer: RosaLinear, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B."""
    return layer.rosa_A[adapter], layer.rosa_B[adapter]


def _check_finite(jobs: list[Job]) -> None:
    factors = [f.detach() for _, layer, a in jobs for f in factors_of(layer, a)]
    if are_finite(factors):
        return
    for name, layer, adapter in jobs:
        for factor in factors_of(layer, adapter):
            if not are_finite([factor.detach()]):
                raise UserError(
                    f"a factor of layer {name} has NaN or infinity: the training has diverged. Go "
                    "back to a checkpoint and lower the learning rate"
                )


def look(
    model: nn.Module,
    jobs: list[Job],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> None:
    """Watch the backward passes of some batches; every parameter's gradient is left as it was.

    Raises:
        ValueError: a batch gives no loss.
    """
    for _, layer, adapter in jobs:
        layer.watch(adapter)
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for batch in batches:
            with torch.enable_grad():
                value = (loss or _own_loss)(model, send_to_device(batch, device))
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise UserError(
                    "a batch gave no loss to differentiate: give batches with labels that "
                    "model(**batch) computes a loss of, or loss=function(model, batch)"
                )
            value.backward()
    except Exception:
        for _, layer, adapter in jobs:
            layer.forget(adapter)
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise UserError(
            f"a batch is a {type(batch).__name__}, not the model's arguments by name: give "
            "loss=function(model, batch) to say how its loss is computed"
        )
    return getattr(model(**batch), "loss", None)  # type: ignore[return-value]  # is checked


def _agree(jobs: list[Job]) -> None:
    """Sum what data-parallel processes have seen, so that all draw the same."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if there and torch.distributed.get_world_size() > 1:
        for _, layer, adapter in jobs:
            if (sketch := layer.watched(adapter)) is not None:
                for total in sketch.sums.values():
                    torch.distributed.all_reduce(total)


def _warn_of_blind(jobs: list[Job]) -> None:
    blind = [
        name
        for name, layer, adapter in jobs
        if (sketch := layer.watched(adapter)) is None or sketch.is_empty()
    ]
    if blind:
        warnings.warn(
            f"no gradient was seen of {len(blind)} of {len(jobs)} weights, such as {blind[0]}: "
            "random directions are drawn for them. Call rosa.watch(model) a few steps before "
            "rosa.resample, or give it batches; if you did, their loss is 0, NaN or infinite",
            stacklevel=3,
        )


def check(model: nn.Module, optimizer: Any = None) -> list[Job]:
    """The (name, layer, adapter) that a resample would draw; raises as `resample` does."""
    layers = list(rosa_layers(model))
    check_unsharded(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no ROSA layers: attach them with "
            "peft.get_peft_model(model, rosa.RosaConfig(...))"
        )
    for name, layer in layers:
        if layer.merged:
            raise UserError(
                f"layer {name} is merged: call model.unmerge_adapter() before you resample"
            )
        if layer.disable_adapters:
            raise UserError(
                f"layer {name} has its adapters disabled: leave model.disable_adapter(), or call "
                "model.base_model.enable_adapter_layers(), before you resample"
            )
        weight = layer.parameter
        whole = weight.numel() == layer.in_features * layer.out_features
        if weight.is_meta or not whole or is_sharded(weight):
            raise UserError(
                f"the weight of layer {name} is offloaded or sharded over processes: ROSA draws "
                "from whole weights, so train data-parallel without sharding or offloading"
            )
    jobs = [
        (name, layer, adapter)
        for name, layer in layers
        for adapter in layer.active_adapters
        if adapter in layer.rosa_offset
    ]
    for name, layer, adapter in jobs:
        if layer.rosa_A[adapter].is_meta:
            raise UserError(
                f"the factors of layer {name} are on the meta device (low_cpu_mem_usage): load "
                "the adapter's file first, or attach it without low_cpu_mem_usage"
            )
        numbers = layer.r[adapter] * layer.in_features, layer.out_features * layer.r[adapter]
        factors = factors_of(layer, adapter)
        if any(map(is_sharded, factors)) or numbers != tuple(f.numel() for f in factors):
            raise UserError(
                f"the factors of layer {name} are sharded over processes: train data-parallel "
                "without sharding"
            )
    if not jobs:
        raise UserError(
            f"no ROSA adapter is active (active: {layers[0][1].active_adapters}): call "
            "model.set_adapter(name) first"
        )
    if optimizer is not None:
        factors = {f: name for name, layer, a in jobs for f in factors_of(layer, a)}
        trained = {factor: name for factor, name in factors.items() if factor.requires_grad}
        check_optimizer(optimizer, trained)
    return jobs


def check_state(moments: str, optimizer: Any, jobs: list[Job]) -> list[State]:
    """The states of the optimizers that train these; ValueError if `moments` cannot be done."""
    factors = [f for _, layer, a in jobs for f in factors_of(layer, a)]
    states = states_of(optimizer, factors)
    check_moments(moments, states, factors, averages(optimizer, factors))
    return states
