"""DeepSpeed's config of a run: what it may say, and what follows from the run's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rosa.bench.setup.in_parts import check_in_parts
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.errors import UserError, blame

_OF_THE_RUN = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
}
"""What a config need not say: "auto" is transformers' word for what its own arguments say."""
_SAID_OTHERWISE = {
    "optimizer": "--lr and --weight-decay say",
    "scheduler": "--warmup says",
    "train_batch_size": "--batch-size says",
    "train_micro_batch_size_per_gpu": "--batch-size says",
    "gradient_accumulation_steps": "--gradient-accumulation says",
    "gradient_clipping": "Trainer, which cuts the norm to 1, says",
    "bf16": "--precision says",
    "fp16": "--precision says",
}
_BESIDE = (
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "aio"),
    *("comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor"),
    *("zero_allow_untested_optimizer", "zero_optimization"),
)
"""What else a config may say: what changes no result."""

_USUAL = {
    "round_robin_gradients": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_nontrainable_weights": False,
}
"""What decides where ZeRO holds the weights and what its optimizer steps."""


def zero_config(settings: RunSettings) -> dict[str, Any] | None:
    """DeepSpeed's config, None if the run has none; UserError if its file holds none."""
    if settings.deepspeed is None:
        return None
    with blame(f"--deepspeed {settings.deepspeed}", OSError, ValueError):
        values = json.loads(settings.deepspeed.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"--deepspeed {settings.deepspeed} must hold a JSON object")
    return {**_OF_THE_RUN, **values}


@contextmanager
def parts_at_once(settings: RunSettings, stored: str) -> Iterator[None]:
    """While a model is loaded: let ZeRO 3 cut each weight as it comes.

    Args:
        settings: of the run.
        stored: the precision of the model's files, which it is to keep.
    """
    values = zero_config(settings)
    if values is None or _stage(values) != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # any
    precision = {"bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True}}}
    zero = {"zero_optimization": values["zero_optimization"]}
    held = HfDeepSpeedConfig({**zero, **sizes, **precision.get(stored, {})})
    try:
        yield
    finally:
        del held  # transformers asks whether one is held


def check_zero(settings: RunSettings) -> None:
    """Raise UserError where a run cannot be trained as its config of DeepSpeed says."""
    values = zero_config(settings)
    if values is None:
        return
    if find_spec("deepspeed") is None:
        raise UserError("--deepspeed needs a package that is not here: pip install deepspeed")
    check_in_parts(settings, "--deepspeed")
    given = f"--deepspeed {settings.deepspeed}"
    for name in values:
        if name not in (*_OF_THE_RUN, *_SAID_OTHERWISE, *_BESIDE):
            raise UserError(f"{given}: leave {name} out: rosa train was not tried with it")
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict):
        raise UserError(
            f'{given} lacks ZeRO\'s part, such as {{"zero_optimization": {{"stage": 3}}}}'
        )
    to_disk = [
        f"{name} to nvme"
        for name in ("offload_param", "offload_optimizer")
        if isinstance(zero.get(name), dict) and zero[name].get("device") == "nvme"
    ]
    for name in (*(n for n, usual in _USUAL.items() if zero.get(n, usual) != usual), *to_disk):
        raise UserError(f"{given}: leave {name} out: a draw cannot reach what is held so")
    with blame(given, ValueError):
        stage = _stage(values)
    for name, says in _SAID_OTHERWISE.items():
        value = values.get(name, "auto")
        if "auto" not in (value, isinstance(value, dict) and value.get("enabled")):
            raise UserError(f"{given}: leave {name} out: {says} it")
    if find_method(settings.method).virtual_tokens and stage == 3:
        raise UserError(
            f"method {settings.method}: PEFT saves a prompt by a pass that in ZeRO 3 waits for all "
            "processes: choose stage 2 in --deepspeed, or another method"
        )
    if settings.on_nan == "skip":
        raise UserError("--on-nan skip: DeepSpeed has made the step by then: leave one of them out")


def _stage(values: dict[str, Any]) -> int:
    from deepspeed.runtime.zero.config import get_zero_config

    return int(get_zero_config(values).stage)
