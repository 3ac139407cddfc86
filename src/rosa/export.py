"""Turn a ROSA model into what loads where ROSA is unknown: a LoRA adapter, or a plain model.

Whatever is written is loaded back as a user would, and compared, before it takes its place.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    AuxiliaryTrainingWrapper,
    get_peft_model_state_dict,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rosa.algebra.lowrank import LowRank
from rosa.checkpoint import is_rosa_key
from rosa.config import RosaConfig
from rosa.errors import ExportError, UserError, UserTypeError
from rosa.layers.kinds import layers_of, rosa_layers

_PREFIX = "base_model.model."
FORMS = ("merged", "lora")


def export_lora(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write a ROSA adapter as a LoRA adapter: exact, not an approximation of a chosen rank.

    The whole change O + s B A of each weight is a sum of low-rank terms; it is compressed to its
    numerical rank, which differs from layer to layer (`rank_pattern`), at a scale of 1. It is
    loaded back by PEFT onto a model without weights and compared with the adapter.

    Args:
        model: a `PeftModel` with ROSA, wrapped or not; left as it is.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go.
        adapter_name: which adapter; the active one if None.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist; `folder` has such files already.
        ExportError: PEFT loads something else from it; then nothing is left in `folder`.
    """
    model, adapter = _rosa_adapter(model, adapter_name)
    with _staged(folder) as place:
        _write_lora(model, adapter, place)


def export_merged(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write the plain model with the adapter merged, of the base's own class and weight names.

    The model passed is left as it is, so this needs the memory of a second one. What was written is
    loaded back by the base's own class and compared, number by number.

    Args:
        model: a `PeftModel` with ROSA, wrapped or not.
        folder: where the model's files go.
        adapter_name: which adapter; the active one if None.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist; `folder` has a model already.
        ExportError: something else is loaded from it; then nothing is left in `folder`.
    """
    model, adapter = _rosa_adapter(model, adapter_name)
    with _staged(folder) as place:
        _write_merged(model, adapter, place)


# What a folder must not hold already: loading would take it for a part of the export.
_MODEL_FILES = re.compile(
    r"(adapter_config|config|generation_config)\.json"
    r"|(adapter_model|model|pytorch_model).*\.(safetensors|bin|json)"
)


@contextlib.contextmanager
def _staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write in and to check; its files go into `folder` if nothing is raised.

    So a failed export leaves nothing, and what a user has in `folder` stays as it is.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    taken = [name for name in there if _MODEL_FILES.fullmatch(name)]
    if taken:
        raise UserError(
            f"{folder} holds a model or an adapter already ({', '.join(taken[:5])}), which the "
            "export would replace or be mixed with: name a new folder, or remove those first"
        )
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        # Inside, so that moving the files only renames them.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as place:
            yield Path(place)
            clashes = [p.name for p in Path(place).iterdir() if (folder / p.name).exists()]
            if clashes:
                raise UserError(
                    f"{folder} holds {', '.join(sorted(clashes))} already, which the export would "
                    "replace: name a new folder"
                )
            for path in Path(place).iterdir():
                shutil.move(path, folder / path.name)
        done = True
    finally:
        if not done:
            for path in made:
                path.rmdir()


# -- as a LoRA adapter ---------------------------------------------------------------------------


def _write_lora(model: PeftModel, adapter: str, folder: Path) -> None:
    """Write an adapter as LoRA's, and raise ExportError if PEFT would load another model."""
    config = model.peft_config[adapter]
    assert isinstance(config, RosaConfig)
    _check_called(model, adapter)
    state, ranks = {}, {}
    for name, layer in layers_of(model, adapter).items():
        change = layer.whole_change(adapter).compressed()
        if change.rank == 0:  # LoRA has no rank 0
            change = LowRank(torch.zeros(layer.out_features, 1), torch.zeros(1, layer.in_features))
        of_a, of_b = layer.lora_names
        state[f"{name}.{of_a}"], state[f"{name}.{of_b}"] = change.A, change.B
        ranks[name.removeprefix(_PREFIX)] = change.rank
    others = _beside_layers(model, adapter)  # heads, biases: named alike by every method
    state.update({key: value.detach().cpu().contiguous() for key, value in others.items()})
    base = _base(model)
    modules, parameters = _targets(base, list(ranks))
    patterns = {
        f"^{re.escape(name)}" + (r"\.weight" if f"{name}.weight" in parameters else ""): rank
        for name, rank in ranks.items()
    }
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_modules=modules,
        target_parameters=parameters or None,
        bias="lora_only" if config.bias == "rosa_only" else config.bias,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    _check_lora(model, adapter, others, folder)


def _check_called(model: PeftModel, adapter: str) -> None:
    """Raise ExportError where the model reads a layer's weight instead of calling the layer.

    Known once the model has run. Layers that no run has reached were not trained: they hold no
    change, however often their weight was looked at.
    """
    layers = layers_of(model, adapter)
    called = {name for name, layer in layers.items() if getattr(layer, "was_called", False)}
    read = [
        name.removeprefix(_PREFIX)
        for name, layer in layers.items()
        if called and name not in called and getattr(layer, "was_read", False)
        if not _is_rounding(layer.whole_change(adapter))
    ]
    if read:
        raise _no_lora(
            f"the model reads the weight of {', '.join(read[:5])} instead of calling the layer, "
            "where LoRA has no effect"
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
    return {k: v for k, v in found.items() if not is_rosa_key(k) and ".lora_" not in k}


def _check_lora(model: PeftModel, adapter: str, others: dict[str, Tensor], folder: Path) -> None:
    """Load a written LoRA adapter as PEFT does, and compare it with the ROSA adapter."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what PEFT warns of here is what is compared below
        try:
            loaded = PeftModel.from_pretrained(
                _without_weights(_base(model)),
                str(folder),
                low_cpu_mem_usage=True,
                autocast_adapter_dtype=False,  # so that `_same` sees what was rounded
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
            held = layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B
            a, b = (p.data for d in held for p in d.parameters())
            factors[name] = LowRank(b * layer.scaling["default"], a)
    layers = layers_of(model, adapter)
    differ = [
        name
        for name, layer in layers.items()
        if name not in factors or not _same(layer.whole_change(adapter), factors[name])
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


def _no_lora(reason: str) -> ExportError:
    return ExportError(
        f"this adapter cannot be exported to LoRA: {reason}. Nothing was written; export the plain "
        "model instead: rosa.export_merged (rosa export --to merged)"
    )


def _is_rounding(change: LowRank) -> bool:
    """Whether the terms of a change take each other out."""
    probe = _probe(change.A.shape[1])
    b, a = change.B.double(), change.A.double()
    return float((b @ (a @ probe)).norm()) <= 1e-6 * float(b.norm() * a.norm()) * 8**0.5


def _probe(features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, 8, generator=generator, dtype=torch.float64)


def _same(change: LowRank, written: LowRank) -> bool:
    """Whether two products are the same matrix to the rounding of the written factors.

    Told from their products with a few random vectors: what differs, differs there too, and no
    matrix of a weight's size is needed.
    """
    if (len(change.B), change.A.shape[1]) != (len(written.B), written.A.shape[1]):
        return False
    if written.A.is_meta or written.B.is_meta:  # the file did not have them
        return False
    b, a, written_b, written_a = (
        t.cpu().double() for t in (change.B, change.A, written.B, written.A)
    )
    probe = _probe(a.shape[1])
    difference = float((b @ (a @ probe) - written_b @ (written_a @ probe)).norm())
    rounding = 8 * torch.finfo(written.B.dtype).eps * float(written_b.norm() * written_a.norm())
    # The SVD's own, in float64, where large terms take each other out.
    rounding += 1e-12 * float(b.norm() * a.norm())
    return difference <= rounding * 8**0.5


def _without_weights(base: nn.Module) -> nn.Module:
    """A copy of a base model as it was before PEFT, whose weights take no memory."""
    memo: dict[int, Any] = {}
    for module in base.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _hollow(tensor)
    # The copy gets each layer without what PEFT put around it.
    for module in base.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
    for _, layer in rosa_layers(base):
        memo[id(layer)] = copy.deepcopy(layer.get_base_layer(), memo)
    skeleton = copy.deepcopy(base, memo)
    for name in ("peft_config", "hf_device_map"):
        if hasattr(skeleton, name):
            delattr(skeleton, name)
    return skeleton


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that has one number in memory."""
    # PEFT casts the factors to a half-precision weight's dtype when it loads them this way.
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    number = torch.zeros((), dtype=torch.float32 if half else tensor.dtype)
    hollow = number.expand(tensor.shape)
    return nn.Parameter(hollow, requires_grad=False) if isinstance(tensor, nn.Parameter) else hollow


# -- as a plain model ----------------------------------------------------------------------------


def _write_merged(model: PeftModel, adapter: str, folder: Path) -> Any:
    """Write the merged model; raise ExportError if another is loaded from it, else return that.

    A model that has no `save_pretrained` is written as a state dict, and None is returned.
    """
    merged = _merged(model, adapter)
    state = merged.state_dict()
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    expected = {name: _digest(tensor) for name, tensor in state.items()}
    if not hasattr(merged, "save_pretrained"):
        path = folder / "pytorch_model.bin"
        torch.save(state, path)
        del merged, state
        _check_merged(expected, torch.load(path, map_location="cpu", weights_only=True))
        return None
    plain: Any = type(merged)
    try:
        merged.save_pretrained(str(folder))
    except ValueError as error:  # such as generation settings that do not go together
        raise UserError(
            f"{plain.__name__}.save_pretrained refuses this model; nothing was written: {error}"
        ) from error
    how: dict[str, Any] = {}
    if isinstance(merged, PreTrainedModel) and dtypes:
        how["dtype"] = functools.reduce(torch.promote_types, dtypes)  # so that none is rounded
    attention = getattr(getattr(merged, "config", None), "_attn_implementation", None)
    if isinstance(merged, PreTrainedModel) and attention:
        how["attn_implementation"] = attention
    del merged, state  # no three models in memory at a time
    try:
        loaded = plain.from_pretrained(str(folder), **how)
    except Exception as error:
        raise ExportError(
            f"{plain.__name__}.from_pretrained cannot load what its save_pretrained wrote: "
            f"{type(error).__name__}: {error}. Nothing was written: use model.merge_and_unload(), "
            "and save the plain model in a way that its class can load"
        ) from error
    _check_merged(expected, loaded.state_dict())
    return loaded.eval()


Digest = tuple[torch.dtype, torch.Size, str]


def _digest(tensor: Tensor) -> Digest:
    """A tensor's dtype, shape, and a fingerprint of its numbers."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.dtype, tensor.shape, hashlib.blake2b(numbers.data).hexdigest()


def _check_merged(expected: dict[str, Digest], found: dict[str, Tensor]) -> None:
    differ = [
        name
        for name in sorted({*expected, *found})
        if name not in expected
        or name not in found
        # It may be loaded in a wider dtype, which holds the same numbers.
        or _digest(found[name].to(expected[name][0])) != expected[name]
    ]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ExportError(
            f"the merged model is not loaded as it was saved: {', '.join(differ[:5])}{more} "
            "differ. Nothing was written; this model's class does not give its own weights back: "
            "use model.merge_and_unload(), and save that in another way"
        )


def _merged(model: PeftModel, adapter: str) -> Any:
    """A plain copy of the model, with one adapter merged, whatever is in use."""
    merged: Any = _copy(model)
    merged.base_model.enable_adapter_layers()
    for _, layer in rosa_layers(merged):
        if layer.merged:  # maybe with other adapters
            layer.unmerge()
    merged.set_adapter(adapter)  # its head too
    return merged.merge_and_unload(safe_merge=True, adapter_names=[adapter]).requires_grad_(True)


def _base(model: PeftModel) -> nn.Module:
    return model.base_model.model  # type: ignore[return-value]


def _copy(model: PeftModel) -> PeftModel:
    # Accelerate's mixed precision gives the model a forward of its own, which cannot be copied.
    forward = vars(model).get("forward")
    return copy.deepcopy(model, {} if forward is None else {id(forward): forward})


def _rosa_adapter(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, str]:
    """The model without wrappers such as DDP's, and the name of a ROSA adapter of it."""
    inner: Any = model
    if isinstance(model, nn.Module):
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(inner, PeftModel):
        raise UserTypeError(f"expected a PeftModel with ROSA, got {type(inner).__name__}")
    adapter = inner.active_adapters[0] if adapter_name is None else adapter_name
    if not isinstance(inner.peft_config.get(adapter), RosaConfig):
        rosa = [name for name, c in inner.peft_config.items() if isinstance(c, RosaConfig)]
        raise UserError(f"{adapter!r} is not a ROSA adapter of this model; there are: {rosa}")
    return inner, adapter


# -- on the command line -------------------------------------------------------------------------


def export_folder(folder: Path, form: str, output: Path, model: str | None = None) -> float:
    """Export a trained adapter from its folder, with its tokenizer.

    Args:
        folder: a run's folder or an adapter's.
        form: `merged`, a plain model of the base's class; or `lora`, a LoRA adapter.
        output: where it goes; must not exist or be empty.
        model: the base model; None takes the one that the adapter names.

    Returns:
        The largest difference between the logits of the trained model and of what was written, as
        loaded back, on random tokens.

    Raises:
        ValueError, FileNotFoundError: nothing to export there, or `output` is in use.
        ExportError: what is loaded from it computes something else; nothing is left in `output`.
    """
    from rosa.bench import runs

    if form not in FORMS:
        raise UserError(f"--to must be one of {', '.join(FORMS)}; got {form!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty: name a new folder")
    trained, tokenizer = runs.load_trained(folder, model)
    if not isinstance(trained, PeftModel):
        raise UserError(f"{folder} holds a plain model already: there is no adapter to export")
    expected, half = _logits(trained), trained.dtype in (torch.float16, torch.bfloat16)
    with _staged(output) as place:
        if form == "lora":
            _, adapter = _rosa_adapter(trained, None)
            _write_lora(trained, adapter, place)
            trained.config.save_pretrained(str(place))
            written = PeftModel.from_pretrained(trained.unload(), str(place)).eval()
        else:  # merging is the same for every method of PEFT
            written = _write_merged(trained, trained.active_adapters[0], place)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(place))
        difference = float((_logits(written) - expected).abs().max())
        tolerance = (1e-3 * float(expected.abs().max()) + 1e-4) * (100 if half else 1)
        if not difference <= tolerance:
            raise ExportError(
                f"the export to {form} differs from the trained model by {difference:.1e} in its "
                "logits, though its weights do not. Nothing was written; please report this"
            )
    return difference


def _logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (4, 16), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
