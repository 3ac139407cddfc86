"""Names that adapters' files and PEFT's matching can tell apart, and those that they cannot."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.linear import layers_of

# Names that adapters' files and layers use, and where a model's own modules are to be found in one.
_FILE_PARTS = {
    *("A", "B", "draws", "in_weight", "rosa", "rosa_A", "rosa_B", "rosa_offset", "rosa_dropout"),
    *("base_layer", "base_model", "model", "modules_to_save", "original_module", "weight", "bias"),
}
_OWN_MODULES = ("rosa_A", "rosa_B", "rosa_offset", "rosa_dropout", "base_layer")
COMPILED = "_orig_mod."
"""What torch.compile puts before the names of what a model is made of."""


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Raise ValueError for a name that is taken, or that files could not tell from the model's."""
    layers = layers_of(model, name).values()
    if not all(layer.is_untouched(name) for layer in layers):
        raise UserError(
            f"the model already has a trained ROSA adapter {name!r}: choose another adapter_name, "
            "or delete_adapter it first (of a PeftModel; unload() takes all of them out)"
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    taken = {part for each, _ in (*model.named_modules(), *tensors) for part in each.split(".")}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):  # of whatever method
            taken -= module._get_available_adapters()
    taken |= _FILE_PARTS
    if name in taken or not name or "." in name:
        raise UserError(
            f"an adapter cannot be named {name!r}: a part of the model has that name"
            if name in taken
            else f"an adapter's name must not be empty or have a dot, got {name!r}"
        ) from None


def check_modules_to_save(config: RosaConfig, adapter_name: str) -> None:
    """Raise ValueError if PEFT, which goes by endings, would take a part of our layers for one."""
    for wanted in config.modules_to_save or ():
        for own in (*_OWN_MODULES, adapter_name):
            if own.endswith(wanted):
                raise UserError(
                    f"modules_to_save={[wanted]}: PEFT takes every module whose name ends so, and "
                    f"{own!r}, a part of each adapted layer, does. Give more of the name of the "
                    f"module that is meant, such as 'head.{wanted}'"
                )
