"""One run: a model, a task and a method in; a trained model and a result record out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rosa.bench.processes import count, is_first, join, launched, peak_memory_mib, say
from rosa.bench.setup.checking import NOT_RESUMED, check
from rosa.bench.setup.settings import RunSettings
from rosa.bench.setup.zero import zero_config
from rosa.bench.storage import models, runs
from rosa.bench.storage.checkpoints import bring_to_disk, settle
from rosa.bench.storage.record import Record, read_record
from rosa.bench.storage.saving import save_trained
from rosa.bench.tasks.task import Task
from rosa.bench.tokens.tokenizing import digest
from rosa.bench.train.evaluating import measure
from rosa.bench.train.preparing import prepare
from rosa.bench.train.surviving import Clock
from rosa.bench.train.trainer import build_trainer
from rosa.errors import UserError, blame

if TYPE_CHECKING:
    from transformers import TrainerCallback


_DAMAGED = (UnpicklingError, SafetensorError, JSONDecodeError, EOFError)
"""What reading a checkpoint raises where its files are damaged, or hold more than numbers."""


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
    models.check_model(settings.model)
    state = join()
    spread = {"processes": state.num_processes, "zero": zero_config(settings)}
    told = {**settings.to_json(), **spread}
    if state.is_main_process:  # the only one that writes there
        runs.check_output(settings.output, told, resume, overwrite)
    if resume and runs.is_done(settings.output):
        say(f"the run in {settings.output} is finished: nothing to resume")
        return read_record(settings.output)
    if resume and settings.method in NOT_RESUMED and runs.settings_of(settings.output):
        raise UserError(
            f"{settings.method} cannot be resumed: {NOT_RESUMED[settings.method]}. --overwrite "
            "starts again"
        )

    if launched():
        say(f"training in {state.num_processes} process{'es' if count() > 1 else ''}")
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
        metrics = measure(settings, trainer, ready)
        history: dict[str, Any] = _history(trainer.state.log_history)
        best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
        history["kept_step"] = best or trainer.state.global_step
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


def _last_checkpoint(output: Path) -> str | None:
    """The newest whole checkpoint of a run, for all its processes."""
    from accelerate.utils import broadcast_object_list

    newest = [settle(output / runs.CHECKPOINTS) if is_first() else None]
    (found,) = broadcast_object_list(newest)
    return None if found is None else str(found)


def _reported_examples(task: Task, rows: Mapping[str, Any]) -> int:
    if task.generation is not None:
        return len(task.generation.prompts)
    return len(rows.get("test", ()))


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
