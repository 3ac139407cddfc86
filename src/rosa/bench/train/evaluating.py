"""The metrics of a model: of one that was trained, of an adapter, of the base as it is."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rosa.bench import tasks
from rosa.bench.processes import is_first, join
from rosa.bench.setup.checking import check
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import models, runs
from rosa.bench.tasks.chat import usual_length
from rosa.bench.tasks.task import DataSettings, Generation, Task
from rosa.bench.tasks.templates import give_template
from rosa.bench.tokens.reading import longest_input
from rosa.bench.tokens.tokenizing import tokenize
from rosa.bench.train.building import load_base
from rosa.bench.train.preparing import Ready, load_task, load_tokenizer
from rosa.bench.train.trainer import build_trainer
from rosa.errors import UserError


def evaluate(
    folder: Path, data: DataSettings, model: str | None = None, max_length: int | None = None
) -> dict[str, float]:
    """The metrics of a trained model on validation data.

    Args:
        folder: a run's folder, a checkpoint's, an adapter's, or a plain model's.
        data: a task by name, or a validation file.
        model: the base model of an adapter, if not the one that it names.
        max_length: longest text in tokens; None takes the run's own, or the usual one.

    Raises:
        ValueError, FileNotFoundError: the folder or the data is of no use.
    """
    join()
    trained, tokenizer = models.load_trained(folder, model)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: save it beside the model")
    labels = tuple((trained.config.id2label or {}).values())
    before = runs.run_of(folder)
    data = _named_as_before(data, before)
    task = tasks.load_validation(data, models.is_decoder(trained.config), labels)
    how = {
        "max_length": max_length or before.get("max_length") or usual_length(data.validation),
        "loss_on": before.get("loss_on", RunSettings.loss_on),
        "precision": before.get("precision", RunSettings.precision),
    }
    if task.is_chat:
        give_template(tokenizer, None, how["loss_on"])
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer wants a folder of its own
        settings = RunSettings(model=str(folder), output=Path(scratch), method="full", **how)
        return _evaluate_as_it_is(settings, task, trained, tokenizer)


def _named_as_before(data: DataSettings, before: Mapping[str, Any]) -> DataSettings:
    """The data with the columns that the run was trained on, where no others are given."""
    kept = {
        "text_columns": tuple(before.get("text_columns", ())),
        "label_column": before.get("label_column"),
    }
    usual = {f.name: f.default for f in fields(DataSettings) if f.name in kept}
    return replace(data, **{n: v for n, v in kept.items() if v and getattr(data, n) == usual[n]})


def evaluate_base(settings: RunSettings) -> dict[str, float]:
    """The metrics of a run's pretrained model as it is, on the run's data.

    Raises:
        ValueError, FileNotFoundError: the model or the data is of no use.
    """
    settings = check(settings)
    task = load_task(settings)
    tokenizer = load_tokenizer(settings, task)
    model = load_base(settings, task, tokenizer.pad_token_id).model
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer wants a folder of its own
        settings = replace(settings, output=Path(scratch))
        return _evaluate_as_it_is(settings, task, model, tokenizer)


def _evaluate_as_it_is(
    settings: RunSettings, task: Task, model: Any, tokenizer: Any
) -> dict[str, float]:
    reads = longest_input(model)
    rows = tokenize(settings, task, reads, tokenizer)
    trainer, _ = build_trainer(settings, task, rows, model, tokenizer)
    return measure(settings, trainer, Ready(task, tokenizer, rows, model, None, reads))


def measure(settings: RunSettings, trainer: Any, ready: Ready) -> dict[str, float]:
    """Metrics of the best model: on validation, on further splits, and of the texts it writes."""
    from accelerate.utils import broadcast_object_list
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    task, rows = ready.task, ready.rows
    found = trainer.evaluate()
    metrics = {"eval_loss": found["eval_loss"]}
    further = [part for part in rows if part not in ("train", "validation")]
    if task.compute is None:
        metrics["loss"] = found["eval_loss"]
        if task.is_preference:
            metrics["accuracy"] = found["eval_accuracy"]
        else:
            metrics["perplexity"] = math.exp(min(found["eval_loss"], 700))
        for part in further:
            tested = trainer.evaluate(rows[part], metric_key_prefix=part)
            metrics[f"{part}_loss"] = tested[f"{part}_loss"]
    else:
        names = ("loss", "runtime", "samples_per_second", "steps_per_second")
        known = [f"eval_{name}" for name in (*names, "model_preparation_time")]
        metrics.update(
            {k.removeprefix("eval_"): v for k, v in found.items() if k not in (*known, "epoch")}
        )
        names = [name for name in metrics if name != "eval_loss"]
        for part in further:
            tested = trainer.predict(rows[part], metric_key_prefix=part).metrics
            metrics.update({f"{part}_{name}": tested[f"{part}_{name}"] for name in names})
    if task.generation is not None:
        in_parts = is_deepspeed_zero3_enabled() or settings.fsdp  # which needs all
        if trainer.is_world_process_zero() or in_parts:
            metrics.update(_write_texts(settings, task.generation, trainer.model, ready))
        (metrics,) = broadcast_object_list([metrics])
    return metrics


def _write_texts(
    settings: RunSettings, generation: Generation, model: Any, ready: Ready
) -> dict[str, float]:
    """Write texts after the task's prompts, keep them beside the scores, and return the scores."""
    from rosa.bench.train.generation import LEAST_ROOM, generate

    batch_size = max(settings.eval_batch_size // 4, 1)  # beams take the memory of several texts
    learned = (sum(label != -100 for label in labels) for labels in ready.rows["train"]["labels"])
    how = {
        "reads": ready.reads,
        "batch_size": batch_size,
        "max_new_tokens": max(LEAST_ROOM, *learned),  # a small vocabulary takes more for a text
    }
    texts = generate(model, ready.tokenizer, generation.prompts, **how)
    rows = zip(generation.prompts, texts, generation.references, strict=True)
    if is_first():
        runs.write_json(
            settings.output / runs.PREDICTIONS,
            {"texts": [{"prompt": p, "text": t, "references": list(r)} for p, t, r in rows]},
        )
    return generation.score(texts, generation.references)
