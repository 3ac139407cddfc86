"""The trained model in a run's folder, with its model card."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from rosa.bench.processes import count, is_first, launched
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import models, runs
from rosa.bench.tasks.task import Task

_BEGINNING = "rosa_beginning"


def keep_beginning(model: Any) -> None:
    """Keep the factors that LoRA-GA begins with, which it has taken out of the base's weights."""
    folder = TemporaryDirectory()
    model.save_pretrained(folder.name)
    setattr(model, _BEGINNING, folder)


def save_trained(
    settings: RunSettings, task: Task, model: Any, tokenizer: Any, metrics: dict[str, float]
) -> Path:
    """Save the trained model with its tokenizer and a model card; returns its folder.

    Of several processes the first writes; all call it, since each may hold a part.
    """
    from huggingface_hub import ModelCard, ModelCardData

    adapted = find_method(settings.method).config is not None
    place = settings.output / (runs.ADAPTER if adapted else runs.MODEL)
    state = _gathered(model) if settings.fsdp else {}
    if is_first() or not settings.fsdp:
        with _at_hand(p for p in model.parameters() if p.requires_grad or not adapted):
            model.save_pretrained(str(place), is_main_process=is_first(), **state)
    if not is_first():
        return place
    if (beginning := getattr(model, _BEGINNING, None)) is not None:
        _as_of_the_base(beginning.name, place)
    if adapted:
        models.save_config(model.config, place)
    tokenizer.save_pretrained(str(place))
    local = Path(settings.model).exists()
    data = ModelCardData(
        base_model=None if local else settings.model,
        library_name="peft" if adapted else "transformers",
        tags=[settings.method, "rosa-finetune"],
    )
    values = {k: v for k, v in settings.to_json().items() if k not in ("output", "versions")}
    for name in ("data", "train", "validation") if local else ("data", "train"):
        if values[name]:  # a card is for others: not where files lie on this machine
            values[name] = Path(values[name]).name
    values["model"] = models.model_name(settings.model)
    rows = "\n".join(f"| {k} | {v} |" for k, v in values.items() if v is not None)
    scores = "\n".join(f"| {k} | {v:.4f} |" for k, v in metrics.items())
    load = _loading(settings, model, values["model"] if adapted else None)
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {settings.method} on {task.name}\n\n"
        f"`{values['model']}` fine-tuned by `rosa train`:\n\n"
        f"```sh\n{_command(values)} --output {shlex.quote(settings.output.name)}\n```\n\n"
        f"```python\n{load}```\n\n"
        f"| metric | value |\n| --- | --- |\n{scores}\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n"
    )
    ModelCard(text).save(place / "README.md")
    return place


def _as_of_the_base(beginning: str, place: Path) -> None:
    """Make LoRA-GA's saved adapter one of the base that it was given, to that base's rounding.

    Its product less the one that it began with, which is none of the base's any more: factors of
    twice the rank. PEFT's own conversion leaves the head out.
    """
    file = place / SAFETENSORS_WEIGHTS_NAME
    first, state = load_file(Path(beginning, SAFETENSORS_WEIGHTS_NAME)), load_file(file)
    for name, side in ((".lora_A.", 0), (".lora_B.", 1)):
        for key in [key for key in state if name in key]:
            state[key] = torch.cat([state[key], first[key] * (1 - 2 * side)], dim=side)
    save_file(state, file, metadata={"format": "pt"})
    config = runs.read_json(place / CONFIG_NAME)
    config |= {"init_lora_weights": True, "lora_ga_config": None}
    scale = 2**0.5 if config.get("use_rslora") else 2  # of alpha over r, or over its root
    config |= {"r": 2 * config["r"], "lora_alpha": scale * config["lora_alpha"]}
    runs.write_json(place / CONFIG_NAME, config)


def _at_hand(parameters: Iterable[Any]) -> AbstractContextManager[Any]:
    """While they are whole in every process, which DeepSpeed's ZeRO 3 may hold in parts."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(parameters))


def _gathered(model: Any) -> dict[str, Any]:
    """What saves a model in FSDP's parts: all of its state, in the first process's main memory."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, first = get_model_state_dict(model, options=whole), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:  # tied weights are one tensor, of which one name is saved
            state[name] = state[first.setdefault(parameter, name)]
    return {"state_dict": state}


def _loading(settings: RunSettings, model: Any, base: str | None) -> str:
    """Python that loads it; the folder is the card's."""
    own = type(model.get_base_model() if base else model)
    if settings.fsdp:  # which has made classes of its own
        from torch.distributed.fsdp import FSDPModule

        own = next(each for each in own.__mro__ if not issubclass(each, FSDPModule))
    kind = own.__name__
    if base is None:
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained(".")\n'
    size = "" if "CausalLM" in kind else f", num_labels={model.config.num_labels}"
    register = (
        "import rosa  # registers the method with PEFT\n" if settings.method == "rosa" else ""
    )
    return (
        f"{register}from peft import PeftModel\nfrom transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{base}"{size})\n'
        'model = PeftModel.from_pretrained(base, ".")  # this folder\n'
    )


def _command(values: dict[str, Any]) -> str:
    """The command that trains it again, without what is said by default and where it goes."""
    start = ["torchrun", "--nproc-per-node", str(count()), "-m"] if launched() else []
    words = [*start, "rosa", "train"]
    for setting in fields(RunSettings):
        name, value = setting.metadata["option"] or setting.name, values.get(setting.name)
        if value is None or value is False or value == runs.DEFAULTS.get(setting.name):
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        for each in value if isinstance(value, list) else [] if value is True else [value]:
            words += [option, str(each)]
    return shlex.join(words)
