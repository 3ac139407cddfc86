"""What a run leaves behind: its folder, and the trained model in it.

<output>/settings.json   every setting, and the versions of the libraries
<output>/adapter/        the adapter with its tokenizer (for `full` and `head`: model/)
<output>/history.json    losses by step, metrics by epoch
<output>/predictions.json  what a decoder wrote on the test set, where the task asks for it
<output>/metrics.json    the result; written last and whole, so it marks a finished run
<output>/checkpoints/    what --resume goes on from
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rosa.bench.setup.quantizing import quantization, quantize
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage.checkpoints import write_whole
from rosa.errors import UserError, blame, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS, METRICS, HISTORY = "settings.json", "metrics.json", "history.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
COMPARISON = "comparison.json"  # of a folder of many runs
MODEL_CONFIG = "model_config.json"  # beside an adapter
PREDICTIONS = "predictions.json"
_OURS = (METRICS, HISTORY, PREDICTIONS, ADAPTER, MODEL, CHECKPOINTS)
DEFAULTS = {
    f.name: list(f.default) if isinstance(f.default, tuple) else f.default
    for f in fields(RunSettings)
    if f.default is not MISSING
}
"""What a setting is in a file of a version that did not have it yet."""
_LOCK, _DIGEST = ".lock", "data_digest"
_SPLIT = ("batch_size", "gradient_accumulation", "processes")
"""How a step's rows are split, as their product is kept: a run goes on with another split."""


_MISFIT = (ValueError, TypeError, RuntimeError, OSError, SafetensorError)
"""What PEFT raises for an adapter that is not the model's, or whose file is damaged."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file if it is broken, or holds something else."""
    found = _read(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {shown(found)} instead of a JSON object: it is damaged")
    return found


def kept_step(output: Path) -> int | None:
    """The step whose model a run has kept; None of a run of before that was written down."""
    path = output / HISTORY
    return read_json(path).get("kept_step") if path.is_file() else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not valid JSON ({reason}): the file is damaged") from error


def is_done(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (folder / METRICS).is_file()


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder; empty if there is no run there."""
    if not (folder / SETTINGS).is_file():
        return {}
    found = _read(folder / SETTINGS)
    # Others write a settings.json too; ours names the version of this package.
    ours = isinstance(found, dict) and "rosa-finetune" in (found.get("versions") or {})
    return found if ours else {}


def run_of(place: Path) -> dict[str, Any]:
    """The settings of the run whose folder this is, or is in: its adapter's, or a checkpoint's."""
    found = settings_of(place)
    for folder in place.resolve().parents[:2]:
        with suppress(UserError):  # others have files of that name
            found = found or settings_of(folder)
    return found


def check_output(output: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Raise unless `output` can be the folder of a run with these settings; changes nothing.

    Raises:
        ValueError: the folder holds a run and neither `resume` nor `overwrite` is given, holds
            something else, or holds a run with other settings than those to resume.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder")
    before = settings_of(output)
    if not before and output.is_dir() and any(p.name != _LOCK for p in output.iterdir()):
        raise UserError(f"{output} holds files that are not a run's: name a new folder")
    if before and resume:
        _check_same(output, {**DEFAULTS, **before}, settings)  # its version may have had fewer
    elif before and not overwrite:
        raise UserError(
            f"{output} already holds a run: --resume goes on with it, --overwrite starts again"
        )


def _check_same(output: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError where a run has other settings than it is to be gone on with.

    How a step's rows are split over processes and batches is free, where as many are in a step.
    """
    there, here = (_rows_of_a_step(each) for each in ({**settings, **before}, settings))
    # ZeRO's files are each process's own; LoRA-GA's base is changed by what the split rounds.
    is_bound = settings.get("zero") is not None or settings.get("method") == "lora_ga"
    free = ("output", "versions", *(_SPLIT if there == here and not is_bound else ()))
    if before.get("deepspeed") != settings.get("deepspeed"):
        free += ("zero",)  # said by its file
    differ = [
        f"{name} ({before[name]} there, {value} here)"
        for name, value in settings.items()
        if name not in free and before.get(name, value) != value
    ]
    if not differ:
        return
    said = [f"{output} holds a run with other settings: {'; '.join(differ)}."]
    if there != here:
        said.append(
            f"A step has {there} rows there and {here} here: --batch-size and "
            "--gradient-accumulation make as many in any number of processes."
        )
    if is_bound:
        said.append("How a step's rows are split is a part of them here.")
    said.append("Give the same settings to resume it, or --overwrite to start again")
    raise UserError(" ".join(said))


def _rows_of_a_step(settings: dict[str, Any]) -> int:
    return math.prod(settings.get(name, 1) for name in _SPLIT)


@contextmanager
def unless_it_fails(output: Path) -> Iterator[None]:
    """Let a run's folder be made, without anything in it; if this fails, it goes again."""
    made = [folder for folder in (output / CHECKPOINTS, output) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def begin(
    output: Path, settings: dict[str, Any], digest: str, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Make `output` a run's folder, checked before, that no other process trains in meanwhile.

    Args:
        output: the folder.
        settings: the run's.
        digest: of what it trains on: a run must go on with the same.
        resume: the folder's run is gone on with.
        overwrite: delete what a run left there.

    Raises:
        UserError: another process trains there, or the run was begun on other data.
    """
    from filelock import FileLock, Timeout

    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(output / _LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is training in {output}: wait for it or stop it"
        ) from None
    with lock:
        before = settings_of(output).get(_DIGEST, digest)
        if resume and before != digest:
            raise UserError(
                f"the training data is not what the run in {output} was begun on: give the same "
                "files to resume it, or --overwrite to start again"
            )
        if overwrite:  # the result first, so that what is left of it is no finished run
            for name in _OURS:
                path = output / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        write_json(output / SETTINGS, {**settings, _DIGEST: digest})
        yield


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
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    place = trained_place(folder)
    if (place / "adapter_config.json").is_file():
        plain = load_base(place, model, whole)
        with fitting(place, plain):
            trained = PeftModel.from_pretrained(plain, str(place))
        if trained.peft_type == "ADALORA":  # which it asks for with every loss, trained or not
            trained.base_model.trainable_adapter_name = trained.active_adapter  # type: ignore[union-attr]
    elif (place / "config.json").is_file():
        architecture = (read_json(place / "config.json").get("architectures") or [""])[0]
        decoder = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        if architecture and not decoder and not architecture.endswith("SequenceClassification"):
            raise _other_task(place, architecture)
        auto: Any = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
        with blame(f"the model in {place} cannot be loaded"):
            trained = auto.from_pretrained(str(place))
    else:
        if (folder / COMPARISON).is_file():
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


def trained_place(folder: Path) -> Path:
    """Where in a run's folder the adapter or the model is; the folder itself if it is no run's.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or the run is not finished.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name a run's or an adapter's")
    if (folder / SETTINGS).is_file() and not is_done(folder):
        raise UserError(
            f"the run in {folder} is not finished: go on with it by --resume first, or name one of "
            f"its {CHECKPOINTS}"
        )
    return next((p for p in (folder / ADAPTER, folder / MODEL) if p.is_dir()), folder)


def own_tokenizer(place: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside an adapter or a model, if one does."""
    return load_tokenizer(place) if (place / "tokenizer_config.json").is_file() else None


def load_base(place: Path, model: str | None = None, whole: bool = False) -> PreTrainedModel:
    """The base model of an adapter's folder, with a head of the adapter's size; see `load_trained`.

    Raises:
        FileNotFoundError, ValueError: the adapter's files, or the base model, cannot be used.
    """
    from peft import PeftConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rosa.files.checking import check_config

    check_config(place)
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
    if config.task_type == "SEQ_CLS":
        if kept is None:
            raise UserError(
                f"{place} has no {MODEL_CONFIG} to say how many labels there are: save the "
                "model's config there too, as `rosa train` does"
            )
        labels = kept.id2label or {}
        how: dict[str, Any] = {
            "id2label": labels,
            "label2id": {name: i for i, name in labels.items()},
            "ignore_mismatched_sizes": True,  # the adapter brings a head of the right size
        }
        auto: Any = AutoModelForSequenceClassification
    else:
        auto, how = AutoModelForCausalLM, {}
    run = run_of(place)
    load_in = "full" if whole else run.get("load_in", "full")
    how.update(quantization(load_in, run.get("precision") == "bf16"))
    with blame(f"the model {base} cannot be loaded"):
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
