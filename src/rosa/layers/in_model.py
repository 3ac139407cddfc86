"""Where a model has adapted layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rosa.layers.base import RosaLayer


def plain_name(name: str) -> str:
    """The name of a module or parameter in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


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
