"""Transformers' Trainer, set up for a run."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from rosa.bench.processes import join
from rosa.bench.setup.checking import RESAMPLED, schedule
from rosa.bench.setup.fsdp import fsdp_arguments
from rosa.bench.setup.methods import find_method, own_optimizer
from rosa.bench.setup.settings import RunSettings, in_bf16
from rosa.bench.setup.zero import zero_config
from rosa.bench.storage import runs
from rosa.bench.tasks.task import Task
from rosa.bench.train.building import by_trl, target_weights

if TYPE_CHECKING:
    from torch import nn

EVALUATIONS = 5
"""Evaluations in a training whose length is given in steps."""


def build_trainer(
    settings: RunSettings, task: Task, rows: dict[str, Any], model: nn.Module, tokenizer: Any
) -> tuple[Any, Any]:
    """Transformers' Trainer for the run, and its `RosaCallback` if it has one."""
    import torch
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils import logging

    from rosa.bench.train.averaging import item_counter

    class EpochProgress(ProgressCallback):
        """A progress bar with a line per evaluation, not one per log of the loss."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "eval_loss" in logs:
                super().on_log(args, state, control, logs=logs, **kwargs)

    period, steps = steps_of(settings, len(rows["train"]))
    evaluations: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if settings.steps is not None:
        period = -(-steps // EVALUATIONS)
        evaluations = {
            "max_steps": steps,
            **{f"{name}_strategy": "steps" for name in ("eval", "save")},
            **{f"{name}_steps": period for name in ("eval", "save")},
        }
    method = find_method(settings.method)
    optim: dict[str, Any] = {}
    if method.optim is not None:
        task_type = "CAUSAL_LM" if task.kind == "language" else "SEQ_CLS"
        optim |= method.optim(settings, settings.rank or 0)
        optim["optim_target_modules"] = target_weights(settings, model, task_type)
    make_trainer, make_arguments, own = _kind(settings, task, tokenizer)
    args = make_arguments(
        output_dir=str(settings.output / runs.CHECKPOINTS),
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        bf16=in_bf16(settings),
        use_cpu=not torch.accelerator.is_available(),  # without it, bf16 is refused on a CPU
        seed=settings.seed,
        deepspeed=zero_config(settings),
        **fsdp_arguments(settings, model),
        **evaluations,
        # PEFT cannot load an AdaLoRA of other ranks than the model's now: the last epoch's it is.
        load_best_model_at_end=settings.method != "adalora",
        metric_for_best_model=task.metric,
        greater_is_better=task.greater_is_better,
        logging_strategy="steps",
        logging_steps=_log_period(period),
        report_to=settings.report_to,
        disable_tqdm=not logging.is_progress_bar_enabled(),
        remove_unused_columns=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        **optim,
    )

    def compute(prediction: Any) -> dict[str, float]:
        predicted, labels = prediction
        if isinstance(predicted, tuple):  # encoder-decoders give hidden states too
            predicted = predicted[0]
        answers = predicted[:, 0] if task.kind == "regression" else predicted.argmax(-1)
        return task.compute(answers, labels)  # type: ignore[misc]

    callback = schedule(settings) if settings.method in RESAMPLED else None
    trainer = make_trainer(
        model=model,
        count=item_counter("preference" if task.is_preference else task.kind, model),
        skips=settings.on_nan == "skip",
        args=args,
        **own,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        compute_metrics=compute if task.compute else None,
        callbacks=[callback] if callback else None,
        optimizers=(own_optimizer(settings, model), None),
    )
    if settings.method == "adalora":
        trainer.add_callback(_rank_allocation(model, steps))
    if method.optim is not None:
        trainer.add_callback(_projections_beside_weights())
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(EpochProgress())
    trainer.pop_callback(PrinterCallback)  # what is there without a bar prints every loss
    return trainer, callback


def steps_of(settings: RunSettings, rows: int) -> tuple[int, int]:
    """Optimizer steps of an epoch of so many rows, and of the run."""
    batches = -(-rows // (settings.batch_size * join().num_processes))
    epoch = -(-batches // settings.gradient_accumulation)
    return epoch, settings.steps or math.ceil(settings.epochs * epoch)


def _kind(settings: RunSettings, task: Task, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """What makes the trainer, what makes its arguments, and what it alone is given."""
    if by_trl(settings, task):
        from rosa.bench.train import trl_trainers as trl

        own = {"processing_class": tokenizer}
        if task.is_preference:
            return trl.SurvivingDPOTrainer, partial(trl.dpo_arguments, settings.beta), own
        return trl.SurvivingSFTTrainer, partial(trl.sft_arguments, settings.packing), own
    from transformers import TrainingArguments

    from rosa.bench.train.surviving import SurvivingTrainer

    return (
        SurvivingTrainer,
        TrainingArguments,
        {"data_collator": collator(settings, task, tokenizer)},
    )


def collator(settings: RunSettings, task: Task, tokenizer: Any) -> Any:
    """What makes a batch of a task's rows."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if by_trl(settings, task):
        from rosa.bench.train.trl_trainers import sft_collator

        return sft_collator(tokenizer, settings.packing)
    return (DataCollatorForSeq2Seq if task.kind == "language" else DataCollatorWithPadding)(
        tokenizer
    )


def _rank_allocation(model: Any, steps: int) -> Any:
    """What AdaLoRA asks of the training loop: its schedule's length, and a call after each step."""
    from transformers import TrainerCallback

    config = model.base_model.rankallocator.peft_config
    config.total_step, config.tinit, config.tfinal = steps, steps // 10, steps * 3 // 10

    class RankAllocation(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            model.base_model.update_and_allocate(state.global_step)

    return RankAllocation()


def _log_period(steps: int) -> int:
    """About ten losses between evaluations, and one exactly at each: a divisor of the steps."""
    longest = max(steps // 10, 1)
    return max(n for n in range(1, longest + 1) if steps % n == 0)


def _projections_beside_weights() -> Any:
    """Moves what a resumed optimizer projects with to its weight: torch moves tensors alone."""
    from transformers import TrainerCallback

    class Mover(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            for weight, values in kwargs["optimizer"].state.items():
                projector = values.get("projector")
                if projector is not None:
                    projector.ortho_matrix = projector.ortho_matrix.to(weight.device)

    return Mover()
