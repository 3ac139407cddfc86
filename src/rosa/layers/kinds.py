"""The kinds of layers that can be adapted, and where a model has them.

A new kind is a file beside this one, and a name here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rosa.layers.attention import RosaMultiheadAttention
from rosa.layers.base import RosaLayer
from rosa.layers.conv import RosaConv
from rosa.layers.embedding import RosaEmbedding
from rosa.layers.linear import RosaLinear
from rosa.layers.quantized import RosaQuantizedLinear

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


def base_of(module: nn.Module) -> nn.Module:
    """A module without the adapters around it."""
    return module.get_base_layer() if isinstance(module, RosaLayer) else module


def rosa_layers(model: nn.Module) -> Iterator[tuple[str, RosaLayer]]:
    """The adapted layers of a model with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, RosaLayer):
            yield name, module


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, RosaLayer]:
    """The layers that an adapter is in, by their names in a state dict."""
    # The keys of a state dict do not have the prefix of an FSDP wrapper, the modules' names do.
    return {
        name.removeprefix("_fsdp_wrapped_module."): layer
        for name, layer in rosa_layers(model)
        if adapter_name in layer.adapters
    }
