"""Turn a ROSA model into what loads where ROSA is unknown: a LoRA adapter, or a plain model."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from rosa.config import RosaConfig
from rosa.model import rosa_layers

_PREFIX = "base_model.model."


def export_lora(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write a ROSA adapter as a LoRA adapter: exact, not an approximation of a chosen rank.

    The whole change O + s B A of each weight is a sum of low-rank terms; it is compressed to its
    numerical rank, which differs from layer to layer (`rank_pattern`), at a scale of 1.

    Args:
        model: a `PeftModel` with ROSA.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.
        adapter_name: which adapter; the active one if None.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist.
    """
    adapter, config = _rosa_adapter(model, adapter_name)
    state, ranks = {}, {}
    for name, layer in rosa_layers(model):
        if adapter not in layer.rosa_offset:
            continue
        change = layer.whole_change(adapter).compressed()
        state[f"{name}.lora_A.weight"] = change.A
        state[f"{name}.lora_B.weight"] = change.B
        ranks[name.removeprefix(_PREFIX)] = change.rank
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items():
        if ".rosa_" not in key:  # heads, biases: named alike by every method
            state[key] = value.detach().cpu().contiguous()
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        bias="lora_only" if config.bias == "rosa_only" else config.bias,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(state, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))


def export_merged(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write the plain model with the adapter merged, of the base's own class and weight names.

    The model passed is left as it is, so this needs the memory of a second one.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist.
    """
    adapter, _ = _rosa_adapter(model, adapter_name)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True, adapter_names=[adapter])
    merged.requires_grad_(True)
    if hasattr(merged, "save_pretrained"):
        merged.save_pretrained(str(folder))
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(merged.state_dict(), Path(folder) / "pytorch_model.bin")


def _rosa_adapter(model: PeftModel, adapter_name: str | None) -> tuple[str, RosaConfig]:
    if not isinstance(model, PeftModel):
        raise ValueError(f"expected a PeftModel with ROSA, got {type(model).__name__}")
    adapter = model.active_adapters[0] if adapter_name is None else adapter_name
    config = model.peft_config.get(adapter)
    if not isinstance(config, RosaConfig):
        rosa = [name for name, c in model.peft_config.items() if isinstance(c, RosaConfig)]
        raise ValueError(f"{adapter!r} is not a ROSA adapter of this model; there are: {rosa}")
    return adapter, config
