"""DeepSpeed's ZeRO: the optimizer steps flat parts of all parameters, in float32.

In ZeRO 1 and 2 a process steps its own part of each parameter group, which begins and ends anywhere
in a factor; then all parts are gathered, and written over the parameters. In ZeRO 3 it steps its
own part of each parameter, and those parts are all that there is of it. What a draw changes in the
parameters it must change in the stepped parts, then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rosa.errors import UserError
from rosa.pretrained.zero3 import part_of
from rosa.resampling.optimizers import optimizers_in

_ZERO = "deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"
_ZERO_3 = "deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"
_BEGIN_AT_ZERO = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What Adam, Lion and SGD keep of a parameter."""


def partitioned(optimizer: Any) -> list[Partitioned]:
    """The optimizers of ZeRO in an optimizer; see `optimizers_in`."""
    found: list[Partitioned] = []
    for (module, kind), make in ((_ZERO, Partitioned), (_ZERO_3, Partitioned3)):
        if module in sys.modules:
            its = getattr(sys.modules[module], kind)
            found += [make(one) for one in optimizers_in(optimizer) if isinstance(one, its)]
    return found


class Partitioned:
    """What one of the optimizers of ZeRO 1 and 2 holds of the factors.

    Args:
        optimizer: DeepSpeed's, which `deepspeed.initialize` returns.

    Attributes:
        inner: the one that steps the flat parts.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.inner = optimizer.optimizer

    def _groups(self) -> Iterable[tuple[list[nn.Parameter], nn.Parameter]]:
        """The parameters of each group, and this process's flat part of them."""
        zero = self._optimizer
        return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)

    def stepped(self) -> list[dict[str, Any]]:
        """The parameter groups that `inner` steps, of flat parts."""
        return self.inner.param_groups

    def held(self) -> set[int]:
        """The ids of the parameters that it trains."""
        return {id(p) for parameters, _ in self._groups() for p in parameters}

    def parts_of(self, factors: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The flat parts, of this process, of the groups that these factors are in."""
        wanted = set(map(id, factors))
        return [part for group, part in self._groups() if wanted & set(map(id, group))]

    def check(self, factors: Mapping[nn.Parameter, str], moments: str) -> None:
        """Raise ValueError where a draw would leave something of the old subspace.

        Args:
            factors: what is trained, each with its layer's name.
            moments: see `resample`.
        """
        if self._holds_gradients():
            raise UserError(
                "ZeRO holds gradients that no step has used yet: draw after engine.step() at the "
                "end of a step's gradient accumulation"
            )
        for factor, name in factors.items():
            stepped, mine = self._own(factor)
            if stepped is not None and not _is_same(stepped, mine):
                raise UserError(
                    f"the factors of layer {name} are not what ZeRO's flat parts hold at their "
                    "place: turn round_robin_gradients off, and load weights before "
                    "deepspeed.initialize"
                )
        if moments == "clear":
            self._check_clear(factors)

    def _holds_gradients(self) -> bool:
        return getattr(self._optimizer, "micro_step_id", -1) >= 0  # -1 after a step

    def _own(self, factor: Any) -> tuple[Tensor | None, Tensor]:
        """The part of a factor that is here: as it is stepped (None if it is not), and as it is."""
        here = getattr(factor, "_hp_mapping", None)
        return (None, factor) if here is None else (here.hp_fragment, here.lp_fragment)

    def _check_clear(self, factors: Mapping[nn.Parameter, str]) -> None:
        for parameters, part in self._groups():
            group = next(g for g in self.stepped() if any(p is part for p in g["params"]))
            drawn = [p for p in parameters if p in factors]
            if drawn and len(drawn) < len(parameters):
                raise UserError(
                    "ZeRO counts the steps of all parameters of a group as one, so the moments of "
                    f"the factors of layer {factors[drawn[0]]} cannot begin anew without those of "
                    f"{len(parameters) - len(drawn)} other parameters of their group (a head, "
                    "modules_to_save, another adapter): use moments='keep', or give the optimizer "
                    "the factors in a group of their own"
                )
            kept = set(self.inner.state.get(part, {}))
            unknown = kept - set(_BEGIN_AT_ZERO)
            if kept and "step" in group and "step" not in kept:  # as Apex's FusedAdam
                unknown |= {"the group's step"}
            if drawn and unknown:
                raise UserError(
                    f"{type(self.inner).__name__} keeps {', '.join(sorted(unknown))}, of which "
                    "ROSA does not know how it begins, for all parameters of a group of ZeRO "
                    "together: use AdamW, or moments='keep'"
                )

    @torch.no_grad()
    def follow(self, factors: Iterable[nn.Parameter]) -> None:
        """Let the parts hold what the factors now are."""
        for factor in factors:
            stepped, mine = self._own(factor)
            if stepped is not None:  # else it is another process's
                stepped.copy_(mine)

    @torch.no_grad()
    def clear(self, factors: Iterable[nn.Parameter]) -> None:
        """Let the optimizer begin anew with the groups of these factors; see `check`."""
        for part in self.parts_of(factors):
            entry = self.inner.state.get(part, {})
            for name, value in entry.items():  # in place, for DeepSpeed knows these tensors
                entry[name] = value.zero_() if isinstance(value, Tensor) else 0

    @torch.no_grad()
    def spread(self, values: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Values of factors as the flat parts hold the factors: 0 where other parameters lie."""
        found = {}
        for parameters, part in self._groups():
            mine = [p for p in parameters if p in values and p._hp_mapping is not None]  # type: ignore[attr-defined]
            if mine:
                flat = torch.zeros_like(part)
                for factor in mine:
                    here: Any = factor._hp_mapping  # type: ignore[attr-defined]
                    to, of = here.hp_fragment_address, here.lp_fragment_address
                    value = values[factor].flatten().narrow(0, of.start, of.numel)
                    flat.narrow(0, to.start, to.numel).copy_(value)
                found[part] = flat
        return found


class Partitioned3(Partitioned):
    """What ZeRO 3's optimizer holds of the factors."""

    def _groups(self) -> Iterable[tuple[list[nn.Parameter], nn.Parameter]]:
        zero = self._optimizer
        return zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)

    def stepped(self) -> list[dict[str, Any]]:
        """The parameter groups that `inner` steps, which it has only while it does."""
        zero = self._optimizer
        found = [{**group, "params": []} for group in self.inner.param_groups]
        for number, part in enumerate(zero.fp32_partitioned_groups_flat):
            found[zero.sub_group_to_group_id[number]]["params"].append(part)
        return found

    def _holds_gradients(self) -> bool:
        zero = self._optimizer
        return zero.micro_step_id > 0 or zero._epilogue_ran_this_backward

    def _own(self, factor: Any) -> tuple[Tensor | None, Tensor]:
        if not factor.requires_grad:
            return None, factor
        flat, start, size = self._place_of(factor)
        return flat.detach()[start : start + size], factor.ds_tensor

    def _place_of(self, factor: Any) -> tuple[nn.Parameter, int, int]:
        """The flat part that it is in, from where on, and with how many numbers."""
        zero = self._optimizer
        number, start, size = zero.grad_position[zero.get_param_id(factor)]
        return zero.fp32_partitioned_groups_flat[number], start, size

    @torch.no_grad()
    def spread(self, values: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """See `Partitioned.spread`."""
        found: dict[nn.Parameter, Tensor] = {}
        held = self.held()
        for factor, value in ((f, v) for f, v in values.items() if id(f) in held):
            flat, start, _ = self._place_of(factor)
            part = part_of(factor, value)
            whole = found.setdefault(flat, torch.zeros_like(flat))
            whole[start : start + len(part)] = part
        return found


def _is_same(part: Tensor, factor: Tensor) -> bool:
    rounded = part.to(factor.device, factor.dtype)
    return torch.allclose(rounded, factor, rtol=0, atol=0, equal_nan=True)
