"""Whether a model calls its adapted layers or reads their weights: known once it has run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rosa.layers.in_model import layers_of


def see_one_run(model: PeftModel, adapter: str) -> None:
    """Run a model that has not run yet, as one that was just loaded, on inputs of its own.

    Without gradients, in eval mode, and with everything as it was afterwards. It warns where that
    cannot be: the model has no `dummy_inputs` or cannot take them, or the adapter is not in use.
    """
    layers = layers_of(model, adapter).values()
    if any(layer.was_called or layer.was_read for layer in layers):
        return
    base: Any = model.base_model.model
    inputs = getattr(base, "dummy_inputs", None)
    in_use = all(adapter in x.active_adapters and not x.disable_adapters for x in layers)
    if isinstance(inputs, Mapping) and in_use and not any(layer.merged for layer in layers):
        device = next(iter(layers)).base_weight.parameter.device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        training = [module for module in model.modules() if module.training]
        try:
            model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                base(**moved)
            return
        except Exception:  # such as for pictures, whose model says that it takes tokens
            pass
        finally:
            for module in training:
                module.training = True
    warnings.warn(
        "the model has not run yet, so it is not known whether it reads the weights of adapted "
        "layers instead of calling them, where LoRA has no effect: run it once with the adapter "
        "in use, and export then",
        stacklevel=5,
    )
