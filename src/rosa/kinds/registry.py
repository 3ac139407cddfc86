"""Which kind of layer a module is.

A new kind is a file beside this one, and a name here.
"""

from __future__ import annotations

from torch import nn

from rosa.kinds.attention import RosaMultiheadAttention
from rosa.kinds.conv import RosaConv
from rosa.kinds.embedding import RosaEmbedding
from rosa.kinds.linear import RosaLinear
from rosa.kinds.quantized import RosaQuantizedLinear
from rosa.layers.base import RosaLayer

KINDS: tuple[type[RosaLayer], ...] = (
    RosaQuantizedLinear,  # bitsandbytes' are linear layers too
    RosaLinear,
    RosaEmbedding,
    RosaConv,
    RosaMultiheadAttention,
)


def kind_of(module: nn.Module) -> type[RosaLayer] | None:
    """The kind of layer that a module would become; None if it cannot be adapted."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
