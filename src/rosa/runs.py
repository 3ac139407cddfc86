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
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS, METRICS, HISTORY = "settings.json", "metrics.json", "history.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
PREDICTIONS = "predictions.json"
_OURS = (SETTINGS, METRICS, HISTORY, PREDICTIONS, ADAPTER, MODEL, CHECKPOINTS)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file if it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): the file is damaged") from error


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder; empty if there is no run there."""
    if not (folder / SETTINGS).is_file():
        return {}
    found = read_json(folder / SETTINGS)
    # Others write a settings.json too; ours names the version of this package.
    ours = isinstance(found, dict) and "rosa-finetune" in (found.get("versions") or {})
    return found if ours else {}


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
    if not before and output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} holds files that are not a run's: name a new folder")
    if before and resume:
        differ = [
            f"{name} ({before.get(name)} there, {value} here)"
            for name, value in settings.items()
            if name not in ("output", "versions") and before.get(name) != value
        ]
        if differ:
            raise UserError(
                f"{output} holds a run with other settings: {'; '.join(differ)}. Give the same "
                "settings to resume it, or --overwrite to start again"
            )
    elif before and not overwrite:
        raise UserError(
            f"{output} already holds a run: --resume goes on with it, --overwrite starts again"
        )


def begin(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make `output` a run's folder, checked before; `overwrite` deletes what a run left there."""
    if overwrite:
        for name in _OURS:
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / SETTINGS, settings)


def check_model(name: str) -> None:
    """Say why `name` cannot be a pretrained model, as far as can be told without the hub.

    Raises:
        FileNotFoundError: it is neither a folder nor a name that the hub allows.
        ValueError: the folder holds an adapter.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").is_file():
            raise UserError(
                f"{name} is an adapter, not a model: `rosa export {name} --to merged` makes it one"
            )
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"model {name} is neither a folder nor a hub id") from error


def load_trained(
    folder: Path, model: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The trained model of a run's folder or an adapter's, on its base, ready to evaluate.

    Args:
        folder: a run's folder, an adapter's, or a plain model's.
        model: the base model; None takes the one that the adapter names.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or nothing trained in it.
    """
    from peft import PeftConfig, PeftModel
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    import rosa  # noqa: F401  # registers the method

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name a run's or an adapter's")
    unfinished = (folder / SETTINGS).is_file() and not (folder / METRICS).is_file()
    if unfinished:
        raise UserError(f"the run in {folder} is not finished: go on with it by --resume first")
    place = next((p for p in (folder / ADAPTER, folder / MODEL) if p.is_dir()), folder)
    if (place / "adapter_config.json").is_file():
        read_json(place / "adapter_config.json")  # a damaged one is named
        if not (place / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(
                f"{place} has no adapter_model.safetensors: its weights are missing"
            )
        config = PeftConfig.from_pretrained(str(place))
        base = model or config.base_model_name_or_path
        if base is None:
            raise UserError(f"{place} does not name its base model: give --model")
        check_model(base)
        has_config = (place / "config.json").is_file()
        # In the precision that it was trained in: a coarser one would compute something else.
        dtype = (AutoConfig.from_pretrained(place).dtype if has_config else None) or "auto"
        if config.task_type == "SEQ_CLS":
            if not has_config:
                raise UserError(
                    f"{place} has no config.json to say how many labels there are: save the "
                    "model's config there too, as `rosa train` does"
                )
            labels = AutoConfig.from_pretrained(place).id2label or {}
            plain = AutoModelForSequenceClassification.from_pretrained(
                base,
                id2label=labels,
                label2id={name: i for i, name in labels.items()},
                ignore_mismatched_sizes=True,  # the adapter brings a head of the right size
                dtype=dtype,
            )
        else:
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        try:
            trained = PeftModel.from_pretrained(plain, str(place))
        except KeyError as error:
            raise UserError(
                f"{place} lacks weight {error}: its file is of another adapter or another model"
            ) from error
    elif (place / "config.json").is_file():
        architectures = read_json(place / "config.json").get("architectures") or [""]
        decoder = architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
        auto = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
        trained = auto.from_pretrained(str(place))
    else:
        raise UserError(f"{folder} holds neither a run nor an adapter (no adapter_config.json)")
    has_tokenizer = (place / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(place)) if has_tokenizer else None
    return trained.eval(), tokenizer  # type: ignore[return-value]
