"""A mixture's experts: their projections lie in single parameters, which have other names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.kinds.registry import kind_of
from rosa.layers.drawing import waits_for_file
from rosa.layers.in_model import base_of, plain_name
from rosa.targeting.matching import is_target, names_parameter


def check_experts(config: RosaConfig, model: nn.Module) -> None:
    """Say so where `target_modules` names projections of experts, which no module is any more.

    Raises:
        UserError: one of the names is no other module's either; else there is a warning.
    """
    if waits_for_file(config):  # it adapts what it was trained on
        return
    named, parameters = set[str](), set[str]()
    for parameter, part in _parts_of_experts(model):
        if names_parameter(config.target_parameters or (), parameter):
            continue
        container = parameter.rpartition(".")[0]
        keys = (f"{container}.0.{part}", f"{container}.{part}")  # as it was, and as PEFT asks
        if any(is_target(config, key) for key in keys):
            named.add(part)
            parameters.add(".".join(parameter.split(".")[-2:]))
    if not named:
        return
    there = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if kind_of(base_of(module)) and is_target(config, name)
    }
    said = (
        f"target_modules names {', '.join(sorted(named))} of the experts, which transformers "
        f"keeps in single parameters: give target_parameters={sorted(parameters)} to adapt them"
    )
    if named <= there:
        warnings.warn(f"{said}; only other modules of these names are adapted", stacklevel=2)
    else:
        raise UserError(f"{said}, and leave out of target_modules what is no other module's name")


def _parts_of_experts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Parameters that hold all experts, with what a part of one was called before."""
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return
    names = [plain_name(name) for name, _ in model.named_parameters()]
    for change in get_model_conversion_mapping(model):  # type: ignore[arg-type]
        if not isinstance(change, WeightConverter):
            continue
        sources = [s.removesuffix(".weight") for s in change.source_patterns if ".*." in s]
        for parameter in (n for n in names if n.endswith(tuple(change.target_patterns))):
            yield from ((parameter, source.rpartition(".")[2]) for source in sources)
