"""A layer that is dropped while its module lives on: what stands in the weight goes with it.

PEFT's base layers are the pretrained ones, and others rely on it: diffusers takes adapters off by
putting each layer's ``get_base_layer()`` in its place.
"""

from __future__ import annotations

import sys
import warnings
import weakref

from torch import nn

from rosa.pretrained.holders import references_to_itself
from rosa.pretrained.weight import BaseWeight

_OWN = 4
"""References to a module that nobody else holds: the layer's, its weight's, and two here."""


def take_out_with(layer: nn.Module, weight: BaseWeight, merged: list[str]) -> None:
    """Let a weight be the pretrained one again when its layer is no more.

    Of a shallow copy of a layer, as `nn.DataParallel` makes them, the weight is the layer's still.

    Args:
        layer: whose weight it is.
        weight: in memory.
        merged: the layer's list of merged adapters; with some in it the weight stays as it is.
    """
    if not weight.is_watched:
        weight.is_watched = True
        weakref.finalize(layer, _take_out, weight, merged).atexit = False


def _take_out(weight: BaseWeight, merged: list[str]) -> None:
    module = weight.view.module
    if merged or not weight.standing or not weight.is_whole:
        return
    if sys.getrefcount(module) - references_to_itself(module) <= _OWN:  # its hooks may hold it
        return
    try:
        weight.look()
        if weight.is_changed():
            weight.account_for_writes(accept=False)
        weight.put({}, several=False)
    except Exception as error:  # nobody could catch it here
        warnings.warn(
            f"layer {weight.name} was dropped without unload(), and its module keeps an offset of "
            f"ROSA's in its weight: {error}",
            stacklevel=2,
        )
