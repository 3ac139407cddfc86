"""What several tests ask of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from rosa.algebra.sketch import Sketch
from rosa.layers.adapter import Adapter
from rosa.layers.base import RosaLayer
from rosa.resampling.active import active_adapters


def seen_by(layer: RosaLayer, adapter: str = "default") -> Sketch | None:
    """What was seen of the gradient of a layer's weight."""
    return layer.adapters[adapter].sketch


def adapters_of(model: nn.Module, optimizer: Any = None) -> list[Adapter]:
    """The active adapters of all layers."""
    return [active.adapter for active in active_adapters(model, optimizer)]
