"""Turn a ROSA model into what loads where ROSA is unknown: a LoRA adapter, or a plain model."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from rosa.config import RosaConfig
from rosa.errors import UserError
from rosa.lowrank import LowRank
from rosa.model import is_rosa_key, rosa_layers

_PREFIX = "base_model.model."
FORMS = ("merged", "lora")


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
        if change.rank == 0:  # LoRA has no rank 0
            change = LowRank(torch.zeros(layer.out_features, 1), torch.zeros(1, layer.in_features))
        state[f"{name}.lora_A.weight"] = change.A
        state[f"{name}.lora_B.weight"] = change.B
        ranks[name.removeprefix(_PREFIX)] = change.rank
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items():
        if not is_rosa_key(key):  # heads, biases: named alike by every method
            state[key] = value.detach().cpu().contiguous()
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_modules=_targets(model.get_base_model(), list(ranks)),
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


def _targets(model: torch.nn.Module, names: list[str]) -> list[str] | str:
    """Target modules that match these names alone: PEFT takes a name in a list as an ending too."""
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name, _ in model.named_modules() if name not in names):
        return "|".join(re.escape(name) for name in names)
    return names


def export_merged(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write the plain model with the adapter merged, of the base's own class and weight names.

    The model passed is left as it is, so this needs the memory of a second one.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist.
    """
    adapter, _ = _rosa_adapter(model, adapter_name)
    merged = _merged(model, adapter)
    if hasattr(merged, "save_pretrained"):
        merged.save_pretrained(str(folder))
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(merged.state_dict(), Path(folder) / "pytorch_model.bin")


def _merged(model: PeftModel, adapter: str) -> Any:
    merged = copy.deepcopy(model)
    for _, layer in rosa_layers(merged):
        if layer.merged:  # maybe with other adapters
            layer.unmerge()
    return merged.merge_and_unload(safe_merge=True, adapter_names=[adapter]).requires_grad_(True)


def _rosa_adapter(model: PeftModel, adapter_name: str | None) -> tuple[str, RosaConfig]:
    if not isinstance(model, PeftModel):
        raise UserError(f"expected a PeftModel with ROSA, got {type(model).__name__}")
    adapter = model.active_adapters[0] if adapter_name is None else adapter_name
    config = model.peft_config.get(adapter)
    if not isinstance(config, RosaConfig):
        rosa = [name for name, c in model.peft_config.items() if isinstance(c, RosaConfig)]
        raise UserError(f"{adapter!r} is not a ROSA adapter of this model; there are: {rosa}")
    return adapter, config


def export_folder(folder: Path, form: str, output: Path, model: str | None = None) -> float:
    """Export, load what was written as a user would, and compare it with the adapter's model.

    Args:
        folder: a run's folder or an adapter's.
        form: `merged`, a plain model of the base's class; or `lora`, a LoRA adapter.
        output: where it goes; must not exist or be empty.
        model: the base model; None takes the one that the adapter names.

    Returns:
        The largest difference of logits on random tokens.

    Raises:
        ValueError, FileNotFoundError: nothing to export there, or `output` is in use.
        RuntimeError: what was written computes something else; it should not be used.
    """
    from rosa import runs

    if form not in FORMS:
        raise UserError(f"--to must be one of {', '.join(FORMS)}; got {form!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty: name a new folder")
    trained, tokenizer = runs.load_trained(folder, model)
    if not isinstance(trained, PeftModel):
        raise UserError(f"{folder} holds a plain model already: there is no adapter to export")
    if form == "lora":
        _rosa_adapter(trained, None)
    base = copy.deepcopy(trained).unload() if form == "lora" else None
    expected = _logits(trained)
    if form == "lora":  # ROSA's only; merging is the same for every method of PEFT
        export_lora(trained, output)
        trained.config.save_pretrained(str(output))
    else:
        _merged(trained, trained.active_adapters[0]).save_pretrained(str(output))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(output))
    if base is None:
        plain: Any = type(trained.get_base_model())
        written = plain.from_pretrained(str(output)).eval()
    else:
        written = PeftModel.from_pretrained(base, str(output)).eval()
    difference = float((_logits(written) - expected).abs().max())
    tolerance = 1e-3 * float(expected.abs().max()) + 1e-4
    if trained.dtype in (torch.float16, torch.bfloat16):
        tolerance *= 100
    if not difference <= tolerance:
        raise RuntimeError(
            f"the export in {output} differs from the trained model by {difference:.1e} in its "
            "logits: do not use it, and report this"
        )
    return difference


def _logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (4, 16), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
