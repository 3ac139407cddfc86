"""A ROSA adapter as a LoRA adapter, which loads where ROSA is unknown.

What is written is loaded back as a user would, and compared, before it takes its place.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper as LoraParamWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank, transposed
from rosa.config import RosaConfig
from rosa.errors import ExportError
from rosa.export.checking import is_rounding, same, without_weights
from rosa.export.ranks import ALL, Budget, changes_within
from rosa.export.running import see_one_run
from rosa.export.staging import check_not_merged, rosa_adapter, staged
from rosa.files.beside import held_twice
from rosa.files.checkpoint import is_rosa_key
from rosa.kinds.parameter import ParamWrapper
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import layers_of

_PREFIX = "base_model.model."


def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    uniform_rank: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Write a ROSA adapter as a LoRA adapter: exact, or the best approximation within a budget.

    The whole change O + s B A of each weight is a sum of low-rank terms; it is compressed to its
    numerical rank, which differs from layer to layer (`rank_pattern`), at a scale of 1. It is
    loaded back by PEFT onto a model without weights and compared with what was to be written.

    Args:
        model: a `PeftModel` with ROSA, wrapped or not; left as it is.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.
        adapter_name: which adapter; the active one if None.
        rank: keep so many terms of every weight's change; None for no such bound.
        energy: or keep this share of the changes' squared norms over all weights, by as few numbers
            as that takes.
        uniform_rank: let all weights have one rank, as some servers ask for: the smallest one that
            keeps as much; with `rank` that one, even if zeros are added to reach it.
        dtype: of the numbers in the file; None leaves them in the offset's, which is exact.

    Returns:
        By layer, how much of the norm of its change was lost; 0 where it is exact.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist; `folder` has such files already;
            the rank, the energy or the dtype is none.
        ExportError: PEFT loads something else from it; then nothing is left in `folder`.
    """
    budget = Budget(rank, energy, uniform_rank, dtype)
    model, adapter = rosa_adapter(model, adapter_name)
    check_not_merged(model, adapter)
    with staged(folder) as place:
        return write_lora(model, adapter, place, budget)


def write_lora(
    model: PeftModel, adapter: str, folder: Path, budget: Budget = ALL
) -> dict[str, float]:
    """Write an adapter as LoRA's, and raise ExportError if PEFT would load another model."""
    config = model.peft_config[adapter]
    assert isinstance(config, RosaConfig)
    state, ranks, parameters = {}, {}, []
    layers = layers_of(model, adapter)
    kept, errors = changes_within(budget, layers, adapter)
    for name, layer in layers.items():
        change = kept[name]
        _warn_of_hooks(name, layer)
        try:
            factors = layer.as_lora(layer.get_base_layer(), change)
        except ValueError as error:
            raise _no_lora(f"{error} (layer {name.removeprefix(_PREFIX)})") from error
        for factor, values in zip(layer.lora_names, factors, strict=True):
            state[f"{name}.{factor}"] = values.to(budget.dtype).contiguous()
        if isinstance(layer, ParamWrapper):
            parameters.append(layer.name)
            ranks[layer.name] = change.rank
        else:
            ranks[name.removeprefix(_PREFIX)] = change.rank
    see_one_run(model, adapter)
    _check_called(model, adapter)
    others = _beside_layers(model, adapter)  # heads, biases: named alike by every method
    state.update({key: value.detach().cpu().contiguous() for key, value in others.items()})
    base = _base(model)
    modules, experts = _targets(base, [name for name in ranks if name not in parameters])
    patterns = {
        f"^{re.escape(name)}" + (r"\.weight" if f"{name}.weight" in experts else ""): rank
        for name, rank in ranks.items()
    }
    parameters += experts
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_modules=modules,
        target_parameters=parameters or None,
        bias="lora_only" if config.bias == "rosa_only" else config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    _check_lora(model, kept if not budget.is_all else None, adapter, others, folder)
    return errors


def _warn_of_hooks(name: str, layer: RosaLayer) -> None:
    """Warn of hooks of an adapted module, in which ROSA's product lies and LoRA's does not."""
    base = layer.get_base_layer()
    if base._forward_hooks or base._forward_pre_hooks:
        warnings.warn(
            f"the module of layer {name.removeprefix(_PREFIX)} has hooks, beside which PEFT's LoRA "
            "adds its product: if they change inputs or outputs, the exported adapter computes "
            "something else",
            stacklevel=5,
        )


def _check_called(model: PeftModel, adapter: str) -> None:
    """Raise ExportError where the model reads a layer's weight, be it beside calling the layer.

    Known once the model has run. Layers that no run has reached were not trained: they hold no
    change, however often their weight was looked at.
    """
    layers = layers_of(model, adapter)
    fast = [n for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    if found := [name for name in layers if name.startswith(tuple(f"{n}." for n in fast))]:
        raise _no_lora(
            f"{found[0].removeprefix(_PREFIX)} lies in a TransformerEncoderLayer of torch, which "
            "in eval mode reads the pretrained weights, where LoRA has no effect"
        )
    read = [
        name.removeprefix(_PREFIX)
        for name, layer in layers.items()
        if layer.was_read and not is_rounding(layer.whole_change(adapter))
    ]
    if read:
        raise _no_lora(
            f"the model reads the weight of {', '.join(read[:5])}, where LoRA has no effect (if "
            "it was you who read it, load the adapter anew and export that)"
        )


def _targets(base: nn.Module, names: list[str]) -> tuple[list[str] | str, list[str]]:
    """Target modules and target parameters of a LoRA config, which match these layers alone.

    PEFT takes the names of a mixture of experts' layers for those of its experts, and drops the
    layers: there it must be told the parameters instead, which it leaves as they are.
    """
    parameters = [f"{name}.weight" for name in names if _is_taken_for_experts(base, name)]
    modules = [name for name in names if f"{name}.weight" not in parameters]
    endings = tuple(f".{name}" for name in modules)  # a name in a list is taken as an ending too
    if any(n.endswith(endings) for n, _ in base.named_modules() if n not in modules):
        return "|".join(re.escape(name) for name in modules), parameters
    return modules, parameters


def _is_taken_for_experts(base: nn.Module, name: str) -> bool:
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=base, conversions=None)
    except ValueError:  # it wants the gate's and the up projection's names together
        return True
    return name not in (config.target_modules or ())


def _beside_layers(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What an adapter's file holds beside its layers' factors and offsets: heads, biases."""
    found = get_peft_model_state_dict(model, adapter_name=adapter)
    own = {*held_twice(model, found), *(k for k in found if is_rosa_key(k) or ".lora_" in k)}
    return {key: value for key, value in found.items() if key not in own}


def _check_lora(
    model: PeftModel,
    kept: dict[str, LowRank] | None,
    adapter: str,
    others: dict[str, Tensor],
    folder: Path,
) -> None:
    """Load a written LoRA adapter as PEFT does; compare it with what was kept, or the adapter."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what PEFT warns of here is what is compared below
        try:
            loaded = PeftModel.from_pretrained(
                without_weights(_base(model)),
                str(folder),
                low_cpu_mem_usage=True,
                autocast_adapter_dtype=False,  # so that `same` sees what was rounded
                torch_device="cpu",
            )
        except Exception as error:
            raise _no_lora(f"PEFT cannot load it: {type(error).__name__}: {error}") from error
        # PEFT looks for embeddings' short names, and would leave these out of a file of its own.
        held = loaded.state_dict()
        found_others = {key: held[key] for key in others if key in held}
        found_others.update(_beside_layers(loaded, "default"))
    factors = {}
    for name, layer in loaded.named_modules():
        if isinstance(layer, LoraLayer):
            factors[name] = _factors_of(layer)
    layers = layers_of(model, adapter)
    differ = [
        name
        for name, layer in layers.items()
        if name not in factors
        or not same(kept[name] if kept else layer.whole_change(adapter), factors[name])
    ]
    differ += [f"{name} (not adapted)" for name in factors if name not in layers]
    for key in sorted({*others, *found_others}):
        one, two = others.get(key), found_others.get(key)
        if one is None or two is None or not torch.equal(one.cpu(), two.cpu()):
            differ.append(key)
    if differ:
        names = ", ".join(name.removeprefix(_PREFIX) for name in differ[:5])
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise _no_lora(f"PEFT loads something else for {names}{more}")


def _factors_of(layer: LoraLayer) -> LowRank:
    """The change of a weight by PEFT's LoRA, as a matrix or a stack of them."""
    if isinstance(layer, LoraParamWrapper) and layer.num_experts > 1:
        left, right, scaling = layer.get_delta_factors("default")
        if not layer._did_swap_in_out_features:  # it is stored as (experts, in, out)
            left, right = transposed(right), transposed(left)
        return LowRank(left.detach() * scaling, right.detach())
    held = layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B
    a, b = (p.data for d in held for p in d.parameters())
    return LowRank(b.flatten(1) * layer.scaling["default"], a.flatten(1))


def _no_lora(reason: str) -> ExportError:
    return ExportError(
        f"this adapter cannot be exported to LoRA: {reason}. Nothing was written; export the plain "
        "model instead: rosa.export_merged (rosa export --to merged)"
    )


def _base(model: PeftModel) -> nn.Module:
    return model.base_model.model  # type: ignore[return-value]
