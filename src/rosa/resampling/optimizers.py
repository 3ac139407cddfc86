"""Which optimizers train the factors, inside whatever wraps them, and where their state lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from rosa.errors import UserError, UserTypeError

State = MutableMapping[Any, Any]
_DEPTH = 3  # lists in lists, as wrappers keep their parameters by group
_FACTOR = re.compile(r"\brosa_[AB]\b")


def optimizers_in(optimizer: Any, factors: Iterable[Tensor] = ()) -> list[Any]:
    """An optimizer and all that it wraps, the outer ones first, whatever the attributes' names.

    With them come those that step in the backward pass
    (`torch.distributed.optim._apply_optimizer_in_backward`), which the factors know.

    Args:
        optimizer: torch's, a wrapper of it, a list or dict of such, or None.
        factors: what is trained.

    Raises:
        TypeError: there is no optimizer in it.
    """
    found: list[Any] = []
    if optimizer is not None:
        _collect(optimizer, found)
        if not found:  # a wrapper that is no optimizer itself
            _collect(list(getattr(optimizer, "__dict__", {}).values()), found)
        if not found:
            raise UserTypeError(
                f"optimizer must be a torch optimizer, got {type(optimizer).__name__}: give the "
                "one whose step changes the factors in this process, or what wraps it (as "
                "accelerator.prepare returns it), or a list of several"
            )
    for factor in factors:
        _collect(getattr(factor, "_in_backward_optimizers", []), found)
    return found


def _collect(value: Any, found: list[Any]) -> None:
    for each in _optimizers(value):
        if not any(each is other for other in found):
            found.append(each)
            own = getattr(each, "__dict__", {})
            _collect([v for name, v in own.items() if name not in _GROUPS_AND_STATE], found)


_GROUPS_AND_STATE = ("param_groups", "state")


def _optimizers(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    if _is_optimizer(value):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _optimizers(each, depth - 1)


def _is_optimizer(value: Any) -> bool:
    """Also one that is no subclass of torch's; not a schedule, a scaler or a training engine."""
    if isinstance(value, Optimizer):
        return True
    return (
        not isinstance(value, (nn.Module, Tensor, type))
        and callable(getattr(value, "step", None))
        and any(hasattr(value, name) for name in (*_GROUPS_AND_STATE, "zero_grad"))
    )


def states_of(optimizer: Any, factors: Iterable[Tensor] = ()) -> list[State]:
    """The states, by parameter, of an optimizer and of all that it wraps, each once."""
    found = [getattr(one, "state", None) for one in optimizers_in(optimizer, factors)]
    return list({id(s): s for s in found if isinstance(s, MutableMapping)}.values())


def stepping(optimizer: Any, factors: Iterable[Tensor]) -> list[Any]:
    """The optimizers that step the factors themselves: those that wrap no other that does."""
    factors = list(factors)
    wanted = {id(factor) for factor in factors}
    holders = [one for one in optimizers_in(optimizer, factors) if wanted & _held(one)]
    return [
        one
        for one in holders
        if not any(inner is not one and inner in holders for inner in optimizers_in(one))
    ]


def forget_curvature(optimizer: Any) -> None:
    """Drop what LBFGS knows: of all parameters at once, under the first one's name."""
    for one in optimizers_in(optimizer):
        if isinstance(one, LBFGS):
            one.state.clear()


def averages(optimizer: Any, factors: Iterable[Tensor] = ()) -> bool:
    """Whether it is schedule-free: the state holds points in the factors' space, not moments."""
    found = optimizers_in(optimizer, factors)
    return any("train_mode" in (getattr(one, "__dict__", {})) for one in found) or any(
        "train_mode" in group for one in found for group in _groups(one)
    )


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    groups = getattr(optimizer, "param_groups", None)
    return [group for group in groups or [] if isinstance(group, dict)]


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in _groups(optimizer) for p in group.get("params", ())}


def check_optimizer(
    optimizer: Any,
    factors: Mapping[nn.Parameter, str],
    fixed: Mapping[nn.Parameter, str],
    in_parts: set[int],
) -> None:
    """Raise ValueError unless a draw can change these factors under an optimizer's hands.

    Each must be held by an optimizer whose state lies where torch's does. One that keeps copies of
    the factors (master weights, slow weights) would write them back over what is drawn; one that
    knows LoRA's factors by their names does not do for ROSA's what it is for; a rate of their own
    for factors that do not learn trains nothing.

    Args:
        optimizer: see `optimizers_in`.
        factors: what is trained, each with its layer's name.
        fixed: the factors that are not.
        in_parts: the ids of the parameters that ZeRO trains (`rosa.resampling.zero`).

    Raises:
        TypeError: there is no optimizer in it.
    """
    found = optimizers_in(optimizer, factors)
    held = set(in_parts)
    for one in found:
        _check_made_for_lora(one, factors)
        _check_rates(one, factors, fixed)
        _check_without_copies(one, factors)
        if isinstance(getattr(one, "state", None), MutableMapping):
            held |= _held(one)
    for factor, layer in factors.items():
        if id(factor) not in held:
            kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in found))
            raise UserError(
                f"the optimizer does not hold the factors of layer {layer} ({kinds}): build it "
                "from the model after get_peft_model, from parameters with requires_grad. One that "
                "trains copies of them (master weights, as Apex, Megatron, offloading and "
                "DeepSpeed but for ZeRO make) would overwrite what is drawn: train data-parallel "
                "without it"
            )


def _check_rates(
    optimizer: Any, factors: Mapping[nn.Parameter, str], fixed: Mapping[nn.Parameter, str]
) -> None:
    groups = [group for group in _groups(optimizer) if group.get("params")]
    groups = [group for group in groups if group.get("lr") is not None]  # Adafactor has its own
    rates = [float(g["lr"]) for g in groups if any(p in factors for p in g["params"])]
    for group in groups:
        if all(p in fixed for p in group["params"]) and float(group["lr"]) not in rates:
            raise UserError(
                f"the optimizer has a learning rate of its own, {float(group['lr']):g}, for "
                f"{len(group['params'])} factors that do not learn, such as one of layer "
                f"{fixed[group['params'][0]]} (RosaConfig's trained=, or requires_grad): drop "
                "that group, or train that factor"
            )


def _check_without_copies(optimizer: Any, factors: Mapping[nn.Parameter, str]) -> None:
    held = _held(optimizer)
    if not held & {id(factor) for factor in factors}:
        return
    kind = type(optimizer).__name__
    inner = [one for one in optimizers_in(optimizer) if one is not optimizer]
    stepped = {number for one in inner for number in _held(one)}
    kept = _kept_apart(optimizer, held, factors)
    if held & {id(factor) for factor in factors} - stepped and stepped - held:
        kept = [type(one).__name__ for one in inner if _held(one) - held]
    if kept:
        raise UserError(
            f"{kind} keeps tensors of its own for the factors (in {kept[0]}), such as master "
            "weights, slow weights or moments outside its state: a draw cannot change them, and "
            "they would spoil what is drawn. Use an optimizer that steps the parameters "
            "themselves, with its state in optimizer.state[parameter], as torch's do"
        )


def _kept_apart(optimizer: Any, held: set[int], factors: Mapping[nn.Parameter, str]) -> list[str]:
    """Attributes with tensors that are like a factor, or belong to one, and are not it."""
    shapes = {factor.shape for factor in factors}
    found = []
    for name, value in getattr(optimizer, "__dict__", {}).items():
        if name != "state" and (name in _GROUPS_AND_STATE or "state" in name):
            continue  # a saved state, as ZeroRedundancyOptimizer gathers, is not used again
        named = _of_named(value)
        tensors = named if name == "state" else [*named, *_tensors(value)]
        for tensor in tensors:
            copy = named or tensor.shape in shapes or re.search("master|fp32", name)
            if tensor.numel() > 1 and id(tensor) not in held and copy:
                found.append(name)
                break
    return found


def _of_named(value: Any) -> list[Tensor]:
    """The tensors of factors that a dict knows by their names."""
    if not isinstance(value, Mapping):
        return []
    entries = [each for key, each in value.items() if isinstance(key, str) and _FACTOR.search(key)]
    return list(_tensors(entries))


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each, depth - 1)


def _check_made_for_lora(optimizer: Any, factors: Mapping[nn.Parameter, str]) -> None:
    if isinstance(optimizer, LoraFAOptimizer):
        raise UserError(
            "LoRA-FA's optimizer finds LoRA's factors by their names, and would train ROSA's as "
            "plain AdamW does: use torch.optim.AdamW, and RosaConfig(trained='B') to train B alone"
        )
    if _is_loraplus(_groups(optimizer), {id(factor) for factor in factors}):
        raise UserError(
            "LoRA+'s optimizer finds the factors to train faster by LoRA's names, so all of ROSA's "
            "are in its slow group: build the groups yourself, such as [{'params': [p for n, p in "
            "model.named_parameters() if 'rosa_B' in n], 'lr': ratio * lr}, {'params': [p for n, p "
            "in model.named_parameters() if p.requires_grad and 'rosa_B' not in n], 'lr': lr}]"
        )


def _is_loraplus(groups: list[dict[str, Any]], factors: set[int]) -> bool:
    """Whether these are the groups that `peft.optimizers.create_loraplus_optimizer` makes.

    They are always four: slow, embeddings (none that ROSA would train), fast, and fast without
    weight decay; nobody else makes an empty second one.
    """
    if len(groups) != 4 or groups[1]["params"]:
        return False
    rates = [group.get("initial_lr", group.get("lr")) for group in groups]
    decays = [group.get("weight_decay", 0.0) for group in groups]
    return (
        rates[2] == rates[3] != rates[0]
        and decays[0] == decays[1] == decays[2]
        and not decays[3]
        and factors <= {id(p) for p in groups[0]["params"]}
    )
