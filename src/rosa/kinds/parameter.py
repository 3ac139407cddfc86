"""The adapted parameter: one that its module uses by itself, as fused experts use theirs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank
from rosa.config import RosaConfig
from rosa.layers.base import RosaLayer
from rosa.layers.changed import check_no_dropout, with_changed_weight
from rosa.layers.tracing import is_traced
from rosa.pretrained.views import MatrixView
from rosa.pretrained.zero3 import shape_of


class ParamWrapper(RosaLayer):
    """ROSA on one parameter of a module, which computes with the changed one in its place.

    A parameter (out, in); or a stack (experts, out, in), or (experts, in, out) where the module
    says so (`is_transposed`), in which each expert has a subspace of its own. Several parameters of
    a module have a wrapper each, one around the other. PEFT finds it by the name of this class.

    Args:
        base_layer: the module, or a wrapper of another parameter of it.
        adapter_name: as for every layer, and so on.
        parameter_name: of the parameter; None is the one that the class says.
    """

    adapts = "parameters of two or three dimensions (target_parameters)"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *args: Any,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, *args)

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """False: parameters are named, not found."""
        return False

    @staticmethod
    def view_of(base: nn.Module, parameter: str) -> MatrixView:
        """The parameter as a matrix, or as a stack of them."""
        found = getattr(base, parameter)  # None in an attention with widths of their own
        experts = found is not None and len(shape_of(found)) == 3
        return MatrixView(base, parameter, experts and getattr(base, "is_transposed", False))

    @staticmethod
    def as_lora(base: nn.Module, change: LowRank) -> tuple[Tensor, Tensor]:
        """The factors; of a stack those of all experts beside each other."""
        a, b = change.A, change.B
        return (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)) if a.dim() == 3 else (a, b)

    def __getattr__(self, name: str) -> Any:
        """Of the module, with the changed parameter."""
        if name == self.parameter_name:
            return self.weight
        return super().__getattr__(name)

    def update_layer(
        self, adapter_name: str, r: int, alpha: float | None, config: RosaConfig
    ) -> None:
        """Add an adapter; ValueError for dropout, since the product has no inputs of its own."""
        check_no_dropout(self.name, config)
        super().update_layer(adapter_name, r, alpha, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with W + s B A for its parameter."""
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        x = next(given, self.base_weight.parameter)
        if not self._in_use(x, is_traced()):
            return self.base_layer(*args, **kwargs)
        return with_changed_weight(self, *args, **kwargs)
