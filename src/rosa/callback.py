"""`RosaCallback`: draws new subspaces while transformers' Trainer trains."""

from __future__ import annotations

import time
import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rosa.decay import DecayTowardDrawn
from rosa.errors import UserError, UserTypeError
from rosa.moments import check_moments
from rosa.resample import (
    Job,
    check,
    check_state,
    factors_of,
    is_informed,
    resample,
    watch,
)

ROUNDS, SHORTEST_ROUND = 5, 1024
"""What "auto" goes by: subspaces in a training, and the fewest optimizer steps for each."""
FIRST = 32
"""Optimizer steps before the first draw by the gradient, in a training of ten times that."""
WATCHED = 4
"""Optimizer steps that are watched before a draw by the gradient."""


class RosaCallback(TrainerCallback):
    """Resamples the model's active ROSA adapters at the start of a step, every so often.

    Right with gradient accumulation (steps are optimizer steps), with resuming (the place in the
    schedule is the Trainer's own step count) and with `load_best_model_at_end`. Nothing is drawn
    before the first step or after the last one.

    With ``directions="gradient"`` the first draw comes early, at the step `first`, and the others a
    period after one another; the four steps before each are watched. A run that is resumed between
    the two watches anew, so it draws up to four steps later than it would have.

    Args:
        every: ``"auto"``, an epoch or a fifth of the training, whichever is shorter, but 1024
            optimizer steps at least, since a subspace needs some to learn; or ``"epoch"``; or a
            whole number of optimizer steps; or a fraction or multiple of an epoch as a float, such
            as 0.5; or ``"never"``, which leaves the gradient's first draw.
        moments: see `rosa.resample`.
        first: optimizer steps before the first draw by the gradient; None takes 32, or a tenth of
            a shorter training, and at most half a period. Random directions are trained until then:
            what the gradient tells at the very start is about an untrained head.

    Attributes:
        resamples: how many times it has drawn in this process.
        drawn_at: the steps that began with a draw.
        drawn: how many weights it has drawn, in all of them.
        seconds: the time that took.
        period: optimizer steps from one draw to the next, known once training has begun; None for
            "never".

    Raises:
        ValueError, TypeError: an argument is none of these.
    """

    def __init__(
        self,
        every: str | int | float = "auto",
        *,
        moments: str = "clear",
        first: int | None = None,
    ) -> None:
        message = f"every must be 'auto', 'epoch', 'never' or a number, got {every!r}"
        if isinstance(every, str) and every not in ("auto", "epoch", "never"):
            raise UserError(message)
        if isinstance(every, bool) or not isinstance(every, (str, int, float)):
            raise UserTypeError(message)
        if not isinstance(every, str) and not 0 < every < float("inf"):
            raise UserError(f"every must be positive, got {every}")
        check_moments(moments)
        if first is not None and first < 1:
            raise UserError(f"first must be at least 1, got {first}")
        self.every = every
        self.moments = moments
        self.first = first
        self.resamples = 0
        self.drawn_at: list[int] = []
        self.drawn = 0
        self.seconds = 0.0
        self.period: int | None = None
        self._first: int | None = None  # the step that begins with the first draw
        self._watched = 0  # steps that are watched before each draw
        self._draw_at: int | None = None
        self._last_step = -1
        self._decay: DecayTowardDrawn | None = None
        self._jobs: list[Job] = []  # until the first step has shown which of them run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check model and optimizer before any work, and fix the period in steps."""
        jobs = check(kwargs["model"], kwargs.get("optimizer"))
        check_state(self.moments, kwargs.get("optimizer"), jobs)
        self._jobs = jobs
        self._last_step, self._draw_at = -1, None
        self.period = self._period_in_steps(args, state, kwargs.get("train_dataloader"))
        informed = [job for job in jobs if is_informed(job)]
        self._first, self._watched = self.period, 0
        if informed:
            soon = min(FIRST, max(state.max_steps // 10, WATCHED))
            half = soon if self.period is None else max(self.period // 2, 1)
            self._first = min(soon, half) if self.first is None else self.first
            self._watched = min(WATCHED, self._first, half)
        self.on_train_end()
        if kwargs.get("optimizer") is not None:
            self._decay = DecayTowardDrawn(kwargs["optimizer"], jobs)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the optimizer's weight decay as it was."""
        if self._decay is not None:
            self._decay.stop()
            self._decay = None

    def _period_in_steps(
        self, args: TrainingArguments, state: TrainerState, dataloader: Any
    ) -> int | None:
        if isinstance(self.every, int):
            return self.every
        if self.every == "never":
            return None
        batches = _length(dataloader)
        epoch = None
        if batches is not None:
            epoch = max(-(-batches // args.gradient_accumulation_steps), 1)
        if self.every == "auto":
            share = -(-state.max_steps // ROUNDS)
            return max(share if epoch is None else min(share, epoch), SHORTEST_ROUND)
        if epoch is None:
            raise UserError(
                "the training data has no length, so an epoch has no number of steps: "
                "use RosaCallback(every='auto') or every=<optimizer steps>"
            )
        return max(round((1.0 if self.every == "epoch" else float(self.every)) * epoch), 1)

    def draws_before(self, step: int) -> int:
        """How many draws a run from the first step on makes before a step."""
        if self._first is None or step <= self._first:
            return 0
        return 1 if self.period is None else 1 + (step - 1 - self._first) // self.period

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch or resample if it is time to."""
        step = state.global_step
        if step != self._last_step:
            resumed = self._last_step < 0 and step > 0
            self._last_step = step
            self._begin_step(step, resumed, kwargs["model"], kwargs.get("optimizer"))

    def _begin_step(self, step: int, resumed: bool, model: Any, optimizer: Any) -> None:
        ahead = self._steps_to_draw(step)
        if ahead is not None and (ahead == self._watched or (resumed and ahead < self._watched)):
            if self._watched:
                watch(model)
            self._draw_at = step + self._watched
        if step == self._draw_at:
            started = time.perf_counter()
            self.drawn += resample(model, optimizer, moments=self.moments)
            if self._decay is not None:
                self._decay.refresh()
            self.seconds += time.perf_counter() - started
            self.resamples += 1
            self.drawn_at.append(step)

    def _steps_to_draw(self, step: int) -> int | None:
        """Steps until the next draw, 0 if it is due; None if there is none any more."""
        if self._first is None:
            return None
        if step <= self._first:
            return self._first - step
        return None if self.period is None else (self._first - step) % self.period

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name, once, the layers that the first step did not use."""
        jobs, self._jobs = self._jobs, []
        idle = [
            layer.name
            for _, layer, adapter in jobs
            if all(f.requires_grad and f.grad is None for f in factors_of(layer, adapter))
        ]
        if 0 < len(idle) < len(jobs):  # where none has a gradient, it is kept elsewhere
            warnings.warn(
                f"{len(idle)} of {len(jobs)} adapted layers got no gradient in the first step, "
                f"such as {', '.join(idle[:3])}: the model does not use them for these inputs "
                "(experts or a branch that was not taken), or uses them in a way that ROSA cannot "
                "see. Unless that is so, leave them out with exclude_modules",
                stacklevel=2,
            )


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except TypeError:
        return None
