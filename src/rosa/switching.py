"""Switching adapters: of the whole model or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper

from rosa.layers.in_model import rosa_layers


@contextlib.contextmanager
def or_as_before(tuner: BaseTuner) -> Iterator[None]:
    """Let the same adapters be active again if they cannot be switched, or were not whole.

    Raises:
        UserError: a layer's weight was written to by others, or an adapter was loaded in part.
    """
    before: Any = tuner.active_adapters
    wrappers = [m for m in tuner.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    try:
        for _, layer in rosa_layers(tuner.model):
            layer.settle()
        yield
    except BaseException:
        for _, layer in rosa_layers(tuner.model):
            if layer.active_adapters != before:
                with contextlib.suppress(Exception):  # the first error is told
                    layer.set_adapter(before)
        for wrapper in wrappers:
            there = wrapper._get_available_adapters()
            if set(before) <= there and wrapper.active_adapters != before:
                wrapper.set_adapter(before)
        raise
