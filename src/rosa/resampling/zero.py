"""DeepSpeed's ZeRO 1 and 2: the optimizer steps flat parts of all parameters, in float32.

A process steps its own part of each parameter group, which begins and ends anywhere in a factor;
then all parts are gathered, and written over the parameters. What a draw changes in the parameters
it must change in the parts, then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rosa.errors import UserError
from rosa.resampling.optimizers import optimizers_in

_ZERO = "deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"
_BEGIN_AT_ZERO = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What Adam, Lion and SGD keep of a parameter."""


def partitioned(optimizer: Any) -> list[Partitioned]:
    """The optimizers of ZeRO 1 or 2 in an optimizer; see `optimizers_in`."""
    module, kind = _ZERO
    if module not in sys.modules:
        return []
    its = getattr(sys.modules[module], kind)
    return [Partitioned(one) for one in optimizers_in(optimizer) if isinstance(one, its)]


class Partitioned:
    """What one of ZeRO's optimizers holds of the factors.

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
        if getattr(self._optimizer, "micro_step_id", -1) >= 0:  # -1 after a step
            raise UserError(
                "ZeRO holds gradients that no step has used yet: draw after engine.step() at the "
                "end of a step's gradient accumulation"
            )
        for factor, name in factors.items():
            here = getattr(factor, "_hp_mapping", None)
            if here is not None and not _is_same(here.hp_fragment, here.lp_fragment):
                raise UserError(
                    f"the factors of layer {name} are not what ZeRO's flat parts hold at their "
                    "place: turn round_robin_gradients off, and load weights before "
                    "deepspeed.initialize"
                )
        if moments == "clear":
            self._check_clear(factors)

    def _check_clear(self, factors: Mapping[nn.Parameter, str]) -> None:
        for (parameters, part), group in zip(self._groups(), self.inner.param_groups, strict=True):
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
            part = getattr(factor, "_hp_mapping", None)
            if part is not None:  # else it is another process's
                part.update_hp()

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


def _is_same(part: Tensor, factor: Tensor) -> bool:
    rounded = part.to(factor.device, factor.dtype)
    return torch.allclose(rounded, factor, rtol=0, atol=0, equal_nan=True)
