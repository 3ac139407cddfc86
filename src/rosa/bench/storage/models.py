"""The models of runs: the pretrained one, its config and tokenizer, and the trained one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rosa.bench.setup.quantizing import quantization, quantize
from rosa.bench.storage import runs
from rosa.errors import UserError, blame

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_CONFIG = "model_config.json"  # beside an adapter
_DECODERS = ("ForCausalLM", "LMHeadModel")
"""How the names of classes end that write text."""
_MISFIT = (ValueError, TypeError, RuntimeError, OSError, SafetensorError)
"""What PEFT raises for an adapter that is not the model's, or whose file is damaged."""


def check_model(name: str) -> None:
    """Say why `name` cannot be a pretrained model, as far as can be told without the hub.

    Raises:
        FileNotFoundError: it is neither a folder nor a name that the hub allows.
        ValueError: the folder holds an adapter.
    """
    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").is_file():
            raise UserError(
                f"{name} is an adapter, not a model: `rosa export {name} --to merged` makes it one"
            )
        return
    if not _is_hub_id(name):
        raise FileNotFoundError(f"model {name} is neither a folder nor a hub id")


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_config(model: str | Path) -> Any:
    """The config of a model, by its folder or hub id; a `UserError` if it has none of use."""
    from transformers import AutoConfig

    with blame(f"the config of the model {model} cannot be loaded"):
        return AutoConfig.from_pretrained(str(model))


def is_decoder(config: Any) -> bool:
    """Whether a model's configuration is of one that writes text."""
    return any(name.endswith(_DECODERS) for name in config.architectures or ())


def auto_class(decoder: bool) -> Any:
    """The class of transformers that loads such a model, or a text classifier."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if decoder else AutoModelForSequenceClassification


def save_config(config: Any, place: Path) -> None:
    """Keep a model's config beside its adapter: its labels, its precision.

    Not as `config.json`: transformers takes a folder that has one for a whole model's, and one
    without for an adapter's, whose base it then loads.
    """
    config.to_json_file(str(place / MODEL_CONFIG))


def _kept_config(place: Path) -> Any:
    """The config that `save_config` kept, or one that an adapter's folder holds; None without."""
    kept = next((p for p in (place / MODEL_CONFIG, place / "config.json") if p.is_file()), None)
    return load_config(kept) if kept else None


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a model, by its folder or hub id; a `UserError` if it has none of use."""
    from transformers import AutoTokenizer

    with blame(f"the tokenizer of {model} cannot be loaded"):
        return AutoTokenizer.from_pretrained(str(model))


def load_trained(
    folder: Path, model: str | None = None, whole: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The trained model of a run's folder or an adapter's, on its base, ready to evaluate.

    Args:
        folder: a run's folder, a checkpoint's, an adapter's, or a plain model's.
        model: the base model; None takes the one that the adapter names.
        whole: load the base's weights as they are, where the run had quantized them.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or nothing trained in it.
    """
    from peft import PeftModel

    place = runs.trained_place(folder)
    if (place / "adapter_config.json").is_file():
        plain = load_base(place, model, whole)
        with fitting(place, plain):
            trained = PeftModel.from_pretrained(plain, str(place))
        if trained.peft_type == "ADALORA":  # which it asks for with every loss, trained or not
            trained.base_model.trainable_adapter_name = trained.active_adapter  # type: ignore[union-attr]
    elif (place / "config.json").is_file():
        architecture = (runs.read_json(place / "config.json").get("architectures") or [""])[0]
        decoder = architecture.endswith(_DECODERS)
        if architecture and not decoder and not architecture.endswith("SequenceClassification"):
            raise _other_task(place, architecture)
        with blame(f"the model in {place} cannot be loaded"):
            trained = auto_class(decoder).from_pretrained(str(place))
    else:
        if (folder / runs.COMPARISON).is_file():
            raise UserError(f"{folder} is a comparison of many runs: name the folder of one in it")
        raise UserError(f"{folder} holds neither a run nor an adapter (no adapter_config.json)")
    return trained.eval(), own_tokenizer(place)  # type: ignore[return-value]


@contextmanager
def fitting(place: Path, base: PreTrainedModel) -> Iterator[None]:
    """Say of an adapter's folder that it does not fit its base model, where loading it fails."""
    try:
        what = f"is damaged or cut short, or does not fit the model {base.name_or_path}"
        with blame(f"the adapter in {place} {what}", *_MISFIT):
            yield
    except KeyError as error:
        raise UserError(
            f"{place} lacks weight {error}: its file is of another adapter or another model"
        ) from error


def own_tokenizer(place: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside an adapter or a model, if one does."""
    return load_tokenizer(place) if (place / "tokenizer_config.json").is_file() else None


def load_base(place: Path, model: str | None = None, whole: bool = False) -> PreTrainedModel:
    """The base model of an adapter's folder, with a head of the adapter's size; see `load_trained`.

    Raises:
        FileNotFoundError, ValueError: the adapter's files, or the base model, cannot be used.
    """
    from peft import PeftConfig

    from rosa.files.checking import read_config

    read_config(place)
    if not (place / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"{place} has no adapter_model.safetensors: its weights are missing"
        )
    with blame(f"{place / 'adapter_config.json'} cannot be used"):
        config = PeftConfig.from_pretrained(str(place))
    base = model or config.base_model_name_or_path
    if base is None:
        raise UserError(f"{place} does not name its base model: give --model")
    if getattr(config, "init_lora_weights", None) == "lora_ga" and model is None:
        raise UserError(
            f"{place} is of LoRA-GA, without what it began with: it fits the base that its "
            "training changed, and no other. Of a checkpoint, finish the run by --resume and take "
            "its adapter; else train it again, or give the changed base by --model"
        )
    if config.task_type not in (None, "CAUSAL_LM", "SEQ_CLS"):
        raise _other_task(place, str(getattr(config.task_type, "value", config.task_type)))
    check_model(base)
    kept = _kept_config(place)
    # In the precision that it was trained in: a coarser one would compute something else.
    dtype = (kept.dtype if kept else None) or "auto"
    how: dict[str, Any] = {}
    if config.task_type == "SEQ_CLS":
        if kept is None:
            raise UserError(
                f"{place} has no {MODEL_CONFIG} to say how many labels there are: save the "
                "model's config there too, as `rosa train` does"
            )
        labels = kept.id2label or {}
        how = {
            "id2label": labels,
            "label2id": {name: i for i, name in labels.items()},
            "ignore_mismatched_sizes": True,  # the adapter brings a head of the right size
        }
    run = runs.run_of(place)
    load_in = "full" if whole else run.get("load_in", "full")
    how.update(quantization(load_in, run.get("precision") == "bf16"))
    with blame(f"the model {base} cannot be loaded"):
        auto = auto_class(config.task_type != "SEQ_CLS")
        plain = auto.from_pretrained(base, dtype=dtype, **how)
    quantize(load_in, plain)
    return plain


def _other_task(place: Path, task: str) -> UserError:
    return UserError(
        f"{place} is of another task ({task}) than the command knows, which are CAUSAL_LM and "
        "SEQ_CLS, and would be loaded without its head. In Python load the base by its own class, "
        "model = PeftModel.from_pretrained(base, folder), and call rosa.export_merged(model, new "
        "folder), rosa.export_lora or rosa.export_rosa"
    )


_TELL_NOTHING = {
    *("model", "models", "adapter", "adapters", "checkpoint", "checkpoints", "snapshot"),
    *("snapshots", "weights", "run", "runs", "step", "epoch", "base", "pretrained", "trained"),
    *("final", "best", "last", "latest", "main", "merged", "export", "exported", "output", "out"),
    *("hf", "tmp", "home", "root", "users"),
}


def model_name(model: str) -> str:
    """What to call a model where people read it: a hub id, or what a folder's path tells.

    The last part of a path that says more than "model" or "checkpoint-100" does: never the whole
    path, which is this machine's, nor what its card or config names, which it was made from.
    """
    place = Path(model)
    if not place.is_absolute() and not place.is_dir() and _is_hub_id(model):
        return model
    parts = (
        place.resolve().parts[1:]
        if place.is_dir()
        else [p for p in place.parts if p != place.anchor]
    )
    for part in parts[::-1]:
        if part.startswith("models--"):  # the hub's cache: models--<owner>--<name>/snapshots/<hash>
            return part.removeprefix("models--").replace("--", "/")
    return next((part for part in parts[::-1] if not _tells_nothing(part)), "model")


def _tells_nothing(part: str) -> bool:
    words = [word for word in re.split(r"[-_. ]+", part.lower()) if word]
    return all(w in _TELL_NOTHING or re.fullmatch(r"v?\d+|[0-9a-f]{7,}", w) for w in words)
