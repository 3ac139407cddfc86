"""Names that adapters' files and PEFT's matching can tell apart, and those that they cannot."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.layers.in_model import layers_of

# Names that files and layers use: of ROSA's own, and of what stands beside adapters in a model.
_OURS = {"A", "B", "draws", "in_weight", "rosa", "rosa_A", "rosa_B", "rosa_offset", "rosa_dropout"}
_BESIDE = {"base_layer", "base_model", "modules_to_save", "original_module", "weight", "bias"}
_OWN_MODULES = ("rosa_A", "rosa_B", "rosa_offset", "rosa_dropout", "base_layer")
COMPILED = "_orig_mod."
"""What torch.compile puts before the names of what a model is made of."""


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Raise ValueError for a name that is taken, or that files could not tell from the model's."""
    layers = layers_of(model, name).values()
    if not all(layer.adapters[name].is_untouched() for layer in layers):
        raise UserError(
            f"the model already has a trained ROSA adapter {name!r}: choose another adapter_name, "
            "or delete_adapter it first (of a PeftModel; unload() takes all of them out)"
        )
    if name in _OURS | _BESIDE or not name or "." in name:
        raise UserError(
            f"an adapter cannot be named {name!r}: files use that name"
            if name and "." not in name
            else f"an adapter's name must not be empty or have a dot, got {name!r}"
        )
    tuned = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    others = {a for layer in tuned.values() for a in layer._get_available_adapters()} - {name}
    if others:  # PEFT saves one by leaving out what is called like the others
        taken = {"model", *(part for each in _own_names(model, list(tuned)) for part in each)}
        for adapter in (name, *sorted(others)):
            if adapter in taken:
                raise UserError(
                    f"of several adapters, none can be named {adapter!r}: a part of the model has "
                    "that name, and the adapters' files could not be told apart. Choose another "
                    "adapter_name"
                )


def _own_names(model: nn.Module, tuned: list[str]) -> Iterator[list[str]]:
    """The names of what is in a model, in parts, less what a PEFT method has put there."""
    inside = tuple(f"{name}." for name in tuned)
    for name, _ in (
        *model.named_modules(),
        *model.named_parameters(),
        *model.named_buffers(),
    ):
        if not name.startswith(inside):
            parts = name.split(".")
            wrapped = parts.index("modules_to_save") + 1 if "modules_to_save" in parts else None
            yield [part for i, part in enumerate(parts) if i != wrapped]


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
