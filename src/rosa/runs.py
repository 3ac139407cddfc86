"""What a run leaves behind: its folder, and the trained model in it.

<output>/settings.json   every setting, and the versions of the libraries
<output>/adapter/        the adapter with its tokenizer (for `full` and `head`: model/)
<output>/history.json    losses by step, metrics by epoch
<output>/metrics.json    the result; written last and whole, so it marks a finished run
<output>/checkpoints/    what --resume goes on from
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS, METRICS, HISTORY = "settings.json", "metrics.json", "history.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
_OURS = (SETTINGS, METRICS, HISTORY, ADAPTER, MODEL, CHECKPOINTS, "runs")


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
        raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged") from error


def check_output(output: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Raise unless `output` can be the folder of a run with these settings; changes nothing.

    Raises:
        ValueError: the folder holds a run and neither `resume` nor `overwrite` is given, holds
            something else, or holds a run with other settings than those to resume.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: name a folder")
    holds_run = (output / SETTINGS).is_file()
    if not holds_run and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} holds files that are not a run's: name a new folder")
    if holds_run and resume:
        before = read_json(output / SETTINGS)
        differ = [
            f"{name} ({before.get(name)} there, {value} here)"
            for name, value in settings.items()
            if name not in ("output", "versions") and before.get(name) != value
        ]
        if differ:
            raise ValueError(
                f"{output} holds a run with other settings: {'; '.join(differ)}. Give the same "
                "settings to resume it, or --overwrite to start again"
            )
    elif holds_run and not overwrite:
        raise ValueError(
            f"{output} already holds a run: --resume goes on with it, --overwrite starts again"
        )


def begin(output: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make `output` a run's folder, checked before; `overwrite` deletes what a run left there."""
    if overwrite:
        for name in _OURS:
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / SETTINGS, settings)


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
        raise ValueError(f"the run in {folder} is not finished: go on with it by --resume first")
    place = next((p for p in (folder / ADAPTER, folder / MODEL) if p.is_dir()), folder)
    if (place / "adapter_config.json").is_file():
        config = PeftConfig.from_pretrained(str(place))
        base = model or config.base_model_name_or_path
        if base is None:
            raise ValueError(f"{place} does not name its base model: give --model")
        if config.task_type == "SEQ_CLS":
            if not (place / "config.json").is_file():
                raise ValueError(
                    f"{place} has no config.json to say how many labels there are: save the "
                    "model's config there too, as `rosa train` does"
                )
            labels = AutoConfig.from_pretrained(place).id2label or {}
            plain = AutoModelForSequenceClassification.from_pretrained(
                base, id2label=labels, label2id={name: i for i, name in labels.items()}
            )
        else:
            plain = AutoModelForCausalLM.from_pretrained(base)
        trained = PeftModel.from_pretrained(plain, str(place))
    elif (place / "config.json").is_file():
        architectures = read_json(place / "config.json").get("architectures") or [""]
        decoder = architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
        auto = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
        trained = auto.from_pretrained(str(place))
    else:
        raise ValueError(f"{folder} holds neither a run nor an adapter (no adapter_config.json)")
    has_tokenizer = (place / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(str(place)) if has_tokenizer else None
    return trained.eval(), tokenizer  # type: ignore[return-value]
