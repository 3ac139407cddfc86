"""`RosaCallback`: draws new subspaces while transformers' Trainer trains."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rosa.resample import check, resample


class RosaCallback(TrainerCallback):
    """Resamples the model's active ROSA adapters at the start of a step, every so often.

    Right with gradient accumulation (steps are optimizer steps), with resuming (the place in the
    schedule is the Trainer's own step count) and with `load_best_model_at_end`. Nothing is drawn
    before the first step or after the last one.

    Args:
        every: ``"epoch"``; or a whole number of optimizer steps; or a fraction or multiple of an
            epoch as a float, such as 0.5.

    Attributes:
        resamples: how many times it has drawn in this process.
        seconds: the time that took.
        period: optimizer steps between two draws, known once training has begun.

    Raises:
        ValueError, TypeError: `every` is none of these.
    """

    def __init__(self, every: str | int | float = "epoch") -> None:
        if isinstance(every, str) and every != "epoch":
            raise ValueError(f"every must be 'epoch' or a number, got {every!r}")
        if isinstance(every, bool) or not isinstance(every, (str, int, float)):
            raise TypeError(f"every must be 'epoch' or a number, got {every!r}")
        if not isinstance(every, str) and not 0 < every < float("inf"):
            raise ValueError(f"every must be positive, got {every}")
        self.every = every
        self.resamples = 0
        self.seconds = 0.0
        self.period = 0
        self._last_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check model and optimizer before any work, and fix the period in steps."""
        check(kwargs["model"], kwargs.get("optimizer"))
        self._last_step = -1
        if isinstance(self.every, int):
            self.period = self.every
            return
        batches = _length(kwargs.get("train_dataloader"))
        if batches is None:
            raise ValueError(
                "the training data has no length, so an epoch has no number of steps: "
                "use RosaCallback(every=<optimizer steps>)"
            )
        accumulation = args.gradient_accumulation_steps
        steps_per_epoch = max(-(-batches // accumulation), 1)
        epochs = 1.0 if self.every == "epoch" else float(self.every)
        self.period = max(round(epochs * steps_per_epoch), 1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Resample if the steps done so far are a multiple of the period."""
        step = state.global_step
        if step == 0 or step % self.period or step == self._last_step:
            return
        self._last_step = step
        started = time.perf_counter()
        resample(kwargs["model"], kwargs.get("optimizer"))
        self.seconds += time.perf_counter() - started
        self.resamples += 1


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except TypeError:
        return None
