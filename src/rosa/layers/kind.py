"""What a kind of layer says of the modules that it adapts: the seam for a new one."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank
from rosa.pretrained.views import MatrixView


class Kind:
    """A kind of layer, as its class says it.

    Attributes:
        adapts: the classes that it adapts, for messages.
        parameter_name: of the weight, in the module.
        is_quantized: whether its weight is stored in codes, which nothing is written into.
        is_linear: whether its factors are LoRA's of a linear layer.
        runs_in_shards: whether it computes on what tensor parallelism leaves of its weight here.
        lora_names: how a file of PEFT's LoRA calls the factors of such a layer.
    """

    adapts: ClassVar[str]
    parameter_name: str = "weight"
    is_quantized: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False
    runs_in_shards: ClassVar[bool] = False
    lora_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    @staticmethod
    @abstractmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    @staticmethod
    def is_plain(base: nn.Module) -> bool:
        """Whether a module that matches computes what its kind does; a subclass may not.

        True where whatever a module makes of its weight, it makes of the changed one.
        """
        return True

    @staticmethod
    def numbers(base: nn.Module) -> int | None:
        """How many numbers the weight of a module has when it is whole, if the module says it."""
        return None

    @staticmethod
    def view_of(base: nn.Module, parameter: str) -> MatrixView:
        """A module's weight, its parameter of that name, as a matrix (out, in)."""
        return MatrixView(base, parameter)

    def take_config(self, model: nn.Module) -> None:
        """Take what a model says of how its weights are stored; most kinds need nothing."""

    @staticmethod
    def inner(base: nn.Module) -> dict[str, nn.Module]:
        """Modules inside a module that are adapted with it, by name."""
        return {}

    @staticmethod
    def as_lora(base: nn.Module, change: LowRank) -> tuple[Tensor, Tensor]:
        """A and B of a change in the shapes that PEFT's LoRA has; ValueError if it cannot be it."""
        return change.A, change.B
