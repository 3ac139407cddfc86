"""One run: a model, a task and a method in; a trained model and a result record out."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rosa import map_pretrained
from rosa.bench import tasks
from rosa.bench.processes import is_first, join, peak_memory_mib, say
from rosa.bench.setup.checking import RESAMPLED, check
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.bench.setup.zero import zero_config
from rosa.bench.storage import runs
from rosa.bench.storage.checkpoints import bring_to_disk, settle
from rosa.bench.storage.record import Record, read_record
from rosa.bench.storage.saving import save_trained
from rosa.bench.tasks.chat import usual_length
from rosa.bench.tasks.task import DataSettings, Generation, Task
from rosa.bench.tasks.templates import give_template
from rosa.bench.tokens.reading import longest_input
from rosa.bench.tokens.tokenizing import digest, tokenize
from rosa.bench.train.building import adapt, load_base
from rosa.bench.train.surviving import Clock
from rosa.bench.train.trainer import build_trainer, collator
from rosa.errors import UserError, blame

if TYPE_CHECKING:
    from transformers import TrainerCallback


_DAMAGED = (UnpicklingError, SafetensorError, JSONDecodeError, EOFError)
"""What reading a checkpoint raises where its files are damaged, or hold more than numbers."""
FIRST_STEPS = 4
"""Steps' batches that a method sees which begins with the training data's gradient."""


def train(
    settings: RunSettings,
    resume: bool = False,
    overwrite: bool = False,
    variant: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Record:
    """Run one training; returns its result, which is also stored in the output folder.

    Of several processes (`torchrun`), the first writes and prints, and every one returns the record
    once all is written.

    Args:
        settings: of the run.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        variant: what the record calls it; None takes the method's name.
        callbacks: further ones for the Trainer.

    Raises:
        ValueError, TypeError, FileNotFoundError: a setting, a file or the output folder is of no
            use; said before any work is done.
    """
    from accelerate.utils import broadcast_object_list

    settings = check(settings)
    runs.check_model(settings.model)
    state = join()
    spread = {"processes": state.num_processes, "zero": zero_config(settings)}
    told = {**settings.to_json(), **spread}
    if state.is_main_process:  # the only one that writes there
        runs.check_output(settings.output, told, resume, overwrite)
    if resume and runs.is_done(settings.output):
        say(f"the run in {settings.output} is finished: nothing to resume")
        return read_record(settings.output)

    ready = prepare(settings)
    task, tokenizer, rows = ready.task, ready.tokenizer, ready.rows
    model, recorder = ready.model, ready.recorder
    with runs.unless_it_fails(settings.output):
        trainer, callback = build_trainer(settings, task, rows, model, tokenizer)
    begun: AbstractContextManager[None] = nullcontext()
    if state.is_main_process:  # nothing was written before
        how = settings.output, told, digest(rows), resume, overwrite
        begun = runs.begin(*how)
    with begun:
        state.wait_for_everyone()
        clock = Clock()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for further in (*callbacks, *([recorder] if recorder else []), clock):
            trainer.add_callback(further)
        checkpoint = _last_checkpoint(settings.output) if resume else None
        with blame(f"{checkpoint} cannot be resumed: delete it to go on before it", *_DAMAGED):
            trainer.train(resume_from_checkpoint=checkpoint)
        metrics = _evaluate(settings, trainer, ready)
        history: dict[str, Any] = _history(trainer.state.log_history)
        if callback is not None:
            history["drawn_at"] = callback.drawn_at
        if recorder is not None:
            history["changes"] = {"epochs": recorder.epochs, "spectra": recorder.spectra}
        record = Record(
            variant=variant or settings.method,
            method=settings.method,
            rank=settings.rank,
            lr=settings.lr,  # type: ignore[arg-type]  # `check` has chosen one
            seed=settings.seed,
            metric=task.metric,
            reported=task.reported,
            scores=metrics,
            train_loss=history["epochs"][-1]["train_loss"],
            epochs=trainer.state.epoch,
            steps=trainer.state.global_step,
            train_seconds=clock.seconds,
            resamples=len(callback.drawn_at) if callback else 0,
            resample_seconds=callback.seconds if callback else 0.0,
            trainable_parameters=trainable,
            peak_memory_mib=peak_memory_mib(),
            train_examples=len(task.train),
            validation_examples=len(task.validation),
            test_examples=_reported_examples(task, rows),
            adapter_bytes=0,
        )
        place = save_trained(settings, task, trainer.model, tokenizer, metrics)
        if state.is_main_process:
            bring_to_disk(place)
            size = sum(p.stat().st_size for p in place.glob("*.safetensors"))
            record = replace(record, adapter_bytes=size)
            runs.write_json(settings.output / runs.HISTORY, history)
            record.write(settings.output)
    (record,) = broadcast_object_list([record])
    return record


@dataclass(frozen=True)
class Ready:
    """All that a training needs, before anything is written.

    Attributes:
        task, tokenizer: of the run.
        rows: the task's splits as token ids.
        model: as the method trains it.
        recorder: of the change of its weights; None if none is asked for.
        reads: the most tokens that the model reads at once; None if any number.
    """

    task: Task
    tokenizer: Any
    rows: dict[str, Any]
    model: Any
    recorder: Any
    reads: int | None


def prepare(settings: RunSettings) -> Ready:
    """What a run trains and on what; raises as `train` does."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import set_seed

    task = load_task(settings)
    tokenizer = load_tokenizer(settings, task)
    set_seed(settings.seed)
    base = load_base(settings, task, tokenizer.pad_token_id)
    reads = longest_input(base.model)
    if reads is not None:
        reads -= find_method(settings.method).virtual_tokens
    rows = tokenize(settings, task, reads, tokenizer)

    def batches() -> Iterable[dict[str, Any]]:
        order = torch.Generator().manual_seed(settings.seed)
        collate = collator(settings, task, tokenizer)
        size = settings.batch_size
        batches_a_step = settings.gradient_accumulation * join().num_processes
        loader = DataLoader(rows["train"], size, shuffle=True, generator=order, collate_fn=collate)
        return itertools.islice(loader, FIRST_STEPS * batches_a_step)

    model, recorder = adapt(settings, base, batches)
    if settings.method in RESAMPLED and settings.deepspeed is None:
        with suppress(UserError):  # then they are copied, or exact to a rounding
            map_pretrained(model)
    return Ready(task, tokenizer, rows, model, recorder, reads)


def load_task(settings: RunSettings) -> Task:
    """The data of a run; raises as `rosa.bench.tasks.load` does."""
    config = runs.load_config(settings.model)
    names = [f.name for f in fields(DataSettings)]
    data = DataSettings(**{n: getattr(settings, n) for n in names})
    task = tasks.load(data, is_decoder(config))
    if settings.packing and (task.kind != "language" or task.packed):
        raise UserError(f"--packing is for a decoder's texts: not for the task {task.name}")
    if settings.loss_on != RunSettings.loss_on and not task.is_chat:
        raise UserError(
            "--loss-on is for chats, which these rows are not: of a prompt and its completion the "
            "completion is learned, and all of a text"
        )
    if settings.chat_template is not None and not task.has_messages:
        raise UserError("--chat-template is for rows with messages, which these are not")
    return task


def load_tokenizer(settings: RunSettings, task: Task) -> Any:
    """The tokenizer of a run's model, with the chats' template; ValueError if it is of no use."""
    tokenizer = runs.load_tokenizer(settings.model)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{settings.model} has no tokenizer: save it beside the model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if task.has_messages:
        loss_on = settings.loss_on if task.is_chat else "all"
        give_template(tokenizer, settings.chat_template, loss_on)
    return tokenizer


def evaluate(
    folder: Path, data: DataSettings, model: str | None = None, max_length: int | None = None
) -> dict[str, float]:
    """The metrics of a trained model on validation data.

    Args:
        folder: a run's folder, an adapter's, or a plain model's.
        data: a task by name, or a validation file.
        model: the base model of an adapter, if not the one that it names.
        max_length: longest text in tokens; None takes the run's own, or the usual one.

    Raises:
        ValueError, FileNotFoundError: the folder or the data is of no use.
    """
    join()
    trained, tokenizer = runs.load_trained(folder, model)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: save it beside the model")
    labels = tuple((trained.config.id2label or {}).values())
    before = runs.settings_of(folder) or runs.settings_of(folder.parent)  # an adapter's is above
    data = _named_as_before(data, before)
    task = tasks.load_validation(data, is_decoder(trained.config), labels)
    how = {
        "max_length": max_length or before.get("max_length") or usual_length(data.validation),
        "loss_on": before.get("loss_on", RunSettings.loss_on),
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
    return _evaluate(settings, trainer, Ready(task, tokenizer, rows, model, None, reads))


def is_decoder(config: Any) -> bool:
    """Whether a model's configuration is of one that writes text."""
    endings = ("ForCausalLM", "LMHeadModel")
    return any(name.endswith(endings) for name in config.architectures or ())


def _last_checkpoint(output: Path) -> str | None:
    """The newest whole checkpoint of a run, for all its processes."""
    from accelerate.utils import broadcast_object_list

    newest = [settle(output / runs.CHECKPOINTS) if is_first() else None]
    (found,) = broadcast_object_list(newest)
    return None if found is None else str(found)


def _evaluate(settings: RunSettings, trainer: Any, ready: Ready) -> dict[str, float]:
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
        known = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        metrics.update(
            {k.removeprefix("eval_"): v for k, v in found.items() if k not in (*known, "epoch")}
        )
        names = [name for name in metrics if name != "eval_loss"]
        for part in further:
            tested = trainer.predict(rows[part], metric_key_prefix=part).metrics
            metrics.update({f"{part}_{name}": tested[f"{part}_{name}"] for name in names})
    if task.generation is not None:
        if trainer.is_world_process_zero() or is_deepspeed_zero3_enabled():  # needs all
            metrics.update(_write_texts(settings, task.generation, trainer.model, ready))
        (metrics,) = broadcast_object_list([metrics])
    return metrics


def _reported_examples(task: Task, rows: Mapping[str, Any]) -> int:
    if task.generation is not None:
        return len(task.generation.prompts)
    return len(rows.get("test", ()))


def _write_texts(
    settings: RunSettings, generation: Generation, model: Any, ready: Ready
) -> dict[str, float]:
    """Write texts after the task's prompts, keep them beside the scores, and return the scores."""
    from rosa.bench.train.generation import generate

    batch_size = max(settings.eval_batch_size // 4, 1)  # beams take the memory of several texts
    how = {"reads": ready.reads, "batch_size": batch_size}
    texts = generate(model, ready.tokenizer, generation.prompts, **how)
    rows = zip(generation.prompts, texts, generation.references, strict=True)
    if is_first():
        runs.write_json(
            settings.output / runs.PREDICTIONS,
            {"texts": [{"prompt": p, "text": t, "references": list(r)} for p, t, r in rows]},
        )
    return generation.score(texts, generation.references)


def _history(log: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Training loss by step, and per epoch its mean with the validation metrics."""
    steps = [
        {"step": r["step"], "epoch": r["epoch"], "loss": r["loss"]} for r in log if "loss" in r
    ]
    epochs, begun = [], 0.0
    for row in (r for r in log if "eval_loss" in r):
        if epochs and row["step"] == epochs[-1]["step"]:
            continue  # the evaluation of the best model after the last epoch
        losses = [s["loss"] for s in steps if begun < s["step"] <= row["step"]]
        epochs.append(
            {
                "epoch": row["epoch"],
                "step": row["step"],
                "train_loss": sum(losses) / len(losses) if losses else None,
                **{k: v for k, v in row.items() if k.startswith("eval_") and not _is_of_speed(k)},
            }
        )
        begun = row["step"]
    return {"steps": steps, "epochs": epochs}


def _is_of_speed(name: str) -> bool:
    """Whether a metric tells of the process, not of the model: TRL counts a process's tokens."""
    return "_per_" in name or name == "eval_num_tokens"
