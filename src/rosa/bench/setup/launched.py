"""What `accelerate launch` has set the processes up for, as a run's settings say it.

The launcher tells it by the environment, which Accelerate reads past the settings of a run. So it
is taken out of there: what a run is has one place.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rosa.bench.processes import is_told
from rosa.bench.setup.fsdp import BLOCKS, RESHARD
from rosa.bench.setup.settings import RunSettings
from rosa.errors import UserError

_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_NOT_DONE = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_DYNAMO_BACKEND": "a dynamo backend",
    "FSDP_IGNORED_MODULES": "FSDP with fsdp_ignored_modules",
}
_BESIDE_THE_FILE = {
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "deepspeed_moe_layer_cls_names",
}
"""What Accelerate's config may say of DeepSpeed, which would not be heard beside a file."""
_FSDP_MUST_BE = {
    "fsdp_version": "2",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_offload_params": "false",
    "fsdp_activation_checkpointing": "false",
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}
"""What `rosa train --fsdp` does, by the names in Accelerate's config."""

_NOTHING = ("", "false", "0", "no", "none")


def as_launched(settings: RunSettings) -> RunSettings:
    """The settings of a run with what its processes were launched for.

    Raises:
        UserError: they were launched for what is not done, or for other than the settings say.
    """
    for name, what in _NOT_DONE.items():
        if _value(name) not in _NOTHING:
            raise UserError(
                f"accelerate launch is set up for {what}, which is not done: do without"
            )
    if is_told("ACCELERATE_USE_CPU") and _has_accelerator():
        raise UserError(
            "accelerate launch is set up for the CPU on a machine with an accelerator: hide that, "
            "as by CUDA_VISIBLE_DEVICES="
        )
    settings = _of_precision(settings)
    _check_accumulation(settings)
    if is_told(_FSDP):
        settings = _of_fsdp(settings)
    if is_told(_DEEPSPEED):
        settings = _of_deepspeed(settings)
    told = (_FSDP, _DEEPSPEED, _PRECISION, _ACCUMULATION)
    for name in list(os.environ):
        of_engine = name.startswith(("FSDP_", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_"))
        if name in told or (of_engine and name not in (BLOCKS, RESHARD)):
            del os.environ[name]
    return settings


def _value(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _check_accumulation(settings: RunSettings) -> None:
    asked, ours = _value(_ACCUMULATION), settings.gradient_accumulation
    if asked not in (*_NOTHING, "auto", "1", str(ours)):
        raise UserError(
            f"accelerate launch is set up for gradient_accumulation_steps {asked}, and this run "
            f"for --gradient-accumulation {ours}: say the same in both"
        )


def _of_precision(settings: RunSettings) -> RunSettings:
    asked = _value(_PRECISION)
    if asked in ("", "no"):
        return settings
    if asked != "bf16" or settings.precision not in ("auto", "bf16"):
        raise UserError(
            f"accelerate launch is set up for mixed_precision {asked}, and this run for "
            f"--precision {settings.precision}: launch it with --mixed_precision no"
        )
    return replace(settings, precision="bf16")


def _of_fsdp(settings: RunSettings) -> RunSettings:
    os.environ.setdefault("FSDP_VERSION", "1")  # as Accelerate takes it
    for name, done in _FSDP_MUST_BE.items():
        found = os.environ.get(name.upper(), done)
        if found.lower() != done.lower():
            raise UserError(
                f"accelerate launch is set up for FSDP with {name}: {found}, which is not done: "
                f"set {name}: {done}"
            )
    if _value(RESHARD) not in ("", "true", "false"):
        raise UserError(
            "accelerate launch is set up for FSDP with fsdp_reshard_after_forward: "
            f"{os.environ[RESHARD]}, which is FSDP 1's: set it to true or false"
        )
    return replace(settings, fsdp=True)


def _of_deepspeed(settings: RunSettings) -> RunSettings:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() == "none":
        raise UserError(
            "accelerate launch is set up for DeepSpeed by values of its own: write a config of "
            "DeepSpeed's, and name it by --deepspeed_config_file (deepspeed_config_file)"
        )
    for name, written in _BESIDE_THE_FILE.items():
        if _value(name) not in _NOTHING:
            raise UserError(
                f"accelerate launch is set up for DeepSpeed with {file} and {written} beside it: "
                "leave that out, and say it in the file"
            )
    if settings.deepspeed is not None and settings.deepspeed.resolve() != Path(file).resolve():
        raise UserError(
            f"accelerate launch is set up for DeepSpeed with {file}, and this run has --deepspeed "
            f"{settings.deepspeed}: leave one of them out"
        )
    return replace(settings, deepspeed=Path(file))
