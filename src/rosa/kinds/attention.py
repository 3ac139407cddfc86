"""The adapted attention of torch: `nn.MultiheadAttention`, which uses its weights by itself."""

from __future__ import annotations

from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank
from rosa.kinds.parameter import ParamWrapper


class RosaMultiheadAttention(ParamWrapper):
    """ROSA on `nn.MultiheadAttention`: on the projection of its inputs, and on that of its outputs.

    The first is one weight (3 width, width) for query, key and value; the second a linear layer
    inside, which is adapted too, and which the module reads.
    """

    adapts = "torch.nn.MultiheadAttention"
    parameter_name = "in_proj_weight"
    _qkv_same_embed_dim = True  # as torch's encoder layers ask

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is torch's attention."""
        return isinstance(module, nn.MultiheadAttention)

    @staticmethod
    def is_plain(base: nn.Module) -> bool:
        """Whether query, key and value have one weight together, as they have at equal widths."""
        assert isinstance(base, nn.MultiheadAttention)
        return base._qkv_same_embed_dim

    @staticmethod
    def numbers(base: nn.Module) -> int | None:
        """How many numbers the whole weight has."""
        assert isinstance(base, nn.MultiheadAttention)
        return 3 * base.embed_dim**2

    @staticmethod
    def as_lora(base: nn.Module, change: LowRank) -> tuple[Tensor, Tensor]:
        """ValueError: PEFT 0.21's LoRA computes something else."""
        raise ValueError("PEFT adds LoRA's change of torch's attention's outputs twice")

    @staticmethod
    def inner(base: nn.Module) -> dict[str, nn.Module]:
        """The projection of the outputs."""
        assert isinstance(base, nn.MultiheadAttention)
        return {"out_proj": base.out_proj}
