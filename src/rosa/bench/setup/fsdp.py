"""torch's FSDP 2 in a run: what Trainer is told of it, and what is not trained so."""

from __future__ import annotations

import os
from typing import Any

from rosa.bench.setup.in_parts import check_in_parts
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.errors import UserError

BLOCKS, RESHARD = "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_RESHARD_AFTER_FORWARD"
"""What `accelerate launch` may say of it; no result depends on it."""


def fsdp_arguments(settings: RunSettings, model: Any) -> dict[str, Any]:
    """What TrainingArguments are given of it: its checkpoints are whole, so they can be resumed."""
    if not settings.fsdp:
        return {}
    named = os.environ.get(BLOCKS)
    blocks = named.split(",") if named else _blocks(model)
    how = {
        "version": 2,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if blocks else "NO_WRAP",
        "transformer_layer_cls_to_wrap": blocks,
        "reshard_after_forward": os.environ.get(RESHARD, "true"),
    }
    return {"fsdp": True, "fsdp_config": how}


def _blocks(model: Any) -> list[str]:
    """Names of the classes whose modules are cut each by itself: the model's blocks.

    Not of what holds the embedding, which Accelerate cuts by itself.
    """
    embedding = model.get_input_embeddings()
    there = {
        type(m).__name__ for m in model.modules() if all(e is not embedding for e in m.modules())
    }
    return sorted(there & set(getattr(model, "_no_split_modules", None) or ()))


def runs_here() -> bool:
    """Whether Accelerate sets FSDP up on this machine, which it does on accelerators alone."""
    import torch

    return torch.accelerator.is_available()


def check_fsdp(settings: RunSettings) -> None:
    """Raise UserError where a run cannot be trained in parts over its processes."""
    if not settings.fsdp:
        return
    if settings.deepspeed is not None:
        raise UserError("--fsdp and --deepspeed both cut the weights: give one of them")
    check_in_parts(settings, "--fsdp")
    if not runs_here():
        raise UserError(
            "--fsdp needs accelerators, and there is none here: leave it out, or use DeepSpeed's "
            "ZeRO 3 (--deepspeed), which runs on CPUs too"
        )
    if settings.method == "lora_ga":
        raise UserError("method lora_ga needs whole gradients: leave --fsdp out")
    if find_method(settings.method).virtual_tokens:
        raise UserError(
            f"method {settings.method}: PEFT saves a prompt by a pass of the whole model: leave "
            "--fsdp out"
        )
    if settings.load_in != "full":
        raise UserError(f"--load-in {settings.load_in} was not tried with --fsdp: leave one out")
