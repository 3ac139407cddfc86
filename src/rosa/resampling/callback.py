"""`RosaCallback`: draws new subspaces while transformers' Trainer trains."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rosa.errors import UserError, UserTypeError
from rosa.layers.adapter import Adapter
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.sharding import reshard
from rosa.resampling.active import active_adapters
from rosa.resampling.counting import ItemCounter
from rosa.resampling.decay import DecayTowardDrawn
from rosa.resampling.moments import check_moments
from rosa.resampling.resample import forget, resample, states_to_clear
from rosa.resampling.schedule import Schedule, auto_period, period_of, trained_numbers
from rosa.resampling.seen import FILE, read_seen, recall, recall_count, write_seen
from rosa.resampling.watching import watch

COUNTED = 8
"""Optimizer steps whose items are counted, for "auto"."""


class RosaCallback(TrainerCallback, ExportableState):
    """Resamples the model's active ROSA adapters at the start of a step, every so often.

    Right with gradient accumulation (steps are optimizer steps), with resuming (the place in the
    schedule is the Trainer's own step count) and with `load_best_model_at_end`. Nothing is drawn
    before the first step or after the last one.

    With ``directions="gradient"`` the first draw comes early, at the step `first`, and the 4 steps
    before it are watched; a checkpoint among those holds what was seen, and what was counted for
    "auto". The draws after it, a period after one another, are of random directions: what the
    gradient shows most of is by then learned. Weight decay pulls the factors toward what they were
    drawn as (`rosa.resampling.decay`).

    Args:
        every: ``"auto"``, when the model was shown twice as many items as it trains numbers, and 64
            optimizer steps at least: a subspace that has learned as much as it can hold is worth
            leaving, and one that has not is not. Items are what the loss is a mean of: tokens with
            a label, or examples. Or ``"epoch"``; or a whole number of optimizer steps; or a
            fraction or multiple of an epoch as a float, such as 0.5; or ``"never"``, which leaves
            the gradient's first draw.
        moments: see `rosa.resample`.
        first: optimizer steps before the first draw by the gradient; None takes 32, or a tenth of
            a shorter training, and at most half a period. Random directions are trained until then:
            what the gradient tells at the very start is about an untrained head.

    Attributes:
        drawn_at: the steps that began with a draw, those before a resumed run's checkpoint too.
        drawn: how many weights it has drawn, in all of them, in this process.
        seconds: the time that took.
        period: optimizer steps from one draw to the next; None for "never", and for "auto" until
            the first steps have shown how many items there are.

    Raises:
        ValueError, TypeError: an argument is none of these.
    """

    def __init__(
        self, every: str | int | float = "auto", *, moments: str = "clear", first: int | None = None
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
        self.drawn_at: list[int] = []
        self.drawn = 0
        self.seconds = 0.0
        self.period: int | None = None
        self._schedule = Schedule()
        self._draw_at: int | None = None
        self._last_step = -1
        self._decay: DecayTowardDrawn | None = None
        self._counter: ItemCounter | None = None
        self._adapters: list[Adapter] = []
        self._draws: list[int] = []  # of these, when the optimizer last stepped
        self._stepped = 0  # in this process
        self._counted = 0  # steps whose items are counted
        self._seen: dict[str, Tensor] = {}  # before a resumed run's checkpoint

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoints hold of it."""
        return {
            "args": {"every": self.every, "moments": self.moments, "first": self.first},
            "attributes": {
                "period": self.period,
                "drawn_at": list(self.drawn_at),
                "seconds": self.seconds,
                "trained": self._trained(),
                "has_seen": self._sees(),
            },
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check model and optimizer before any work, and fix the period in steps."""
        self.on_train_end()
        found = active_adapters(kwargs["model"], kwargs.get("optimizer"))
        states_to_clear(self.moments, kwargs.get("optimizer"), found)
        if args.save_strategy != "no":
            _check_saver()
        if state.global_step == 0 and self._draws != [a.draws for a in self._adapters]:
            forget(kwargs.get("optimizer"), found)  # `load_best_model_at_end` went back over a draw
        self._adapters = [active.adapter for active in found]
        self._draws = [adapter.draws for adapter in self._adapters]
        self._stepped = self._counted = 0
        self._last_step, self._draw_at = -1, None
        how, before = self._before(state)
        trained = self._trained()
        now = self.state()["args"]
        # 3 steps are not 3.0 epochs.
        changed = [n for n, value in now.items() if repr(how.get(n, value)) != repr(value)]
        if changed:
            there, here = (", ".join(f"{n}={d[n]!r}" for n in changed) for d in (how, now))
            warnings.warn(
                f"the checkpoint's draws were made with {there}, those to come are with {here}",
                stacklevel=2,
            )
        if before.get("trained", trained) != trained:
            raise UserError(
                f"the checkpoint is of a training of factors {before['trained']}, this one is of "
                f"{trained}: give RosaConfig the checkpoint's trained=, or begin anew"
            )
        self.drawn_at = [step for step in before.get("drawn_at", []) if step < state.global_step]
        self.seconds = before.get("seconds", 0.0)
        self._seen = read_seen(_checkpoint(args, state)) if before.get("has_seen") else {}
        if before.get("has_seen") and not self._seen:
            warnings.warn(
                f"the checkpoint lacks {FILE}, what was seen of the gradient or counted for the "
                "next draw: it is seen anew, and the draws come up to a few steps later",
                stacklevel=2,
            )
        if self.every == "auto":
            self.period = None if "every" in changed else before.get("period")
            if self.period is None:
                self._counter = ItemCounter(kwargs["model"])
                self._counted, items = recall_count(self._seen)
                self._counter.add(items)
        else:
            self.period = self._period_in_steps(args, kwargs.get("train_dataloader"))
        self._plan(state.max_steps)
        if kwargs.get("optimizer") is not None:
            self._decay = DecayTowardDrawn(kwargs["optimizer"], self._adapters)

    def _before(self, state: TrainerState) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments and attributes in the checkpoint that is gone on from, if it holds them."""
        if state.global_step == 0:
            return {}, {}
        saved: Any = state.stateful_callbacks or {}  # a dict, once it comes from a file
        found = saved.get(type(self).__name__, {})
        found = found[0] if isinstance(found, list) else found
        return found.get("args", {}), found.get("attributes", {})

    def _sees(self) -> bool:
        return self._counter is not None or any(a.sketch is not None for a in self._adapters)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put beside the checkpoint what was seen for the next draw."""
        self.write_seen(_checkpoint(args, state))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a model in parts be so again: a checkpoint is loaded into its parts alone."""
        if self._adapters:
            reshard(kwargs["model"])

    def write_seen(self, checkpoint: Path) -> None:
        """Write into a checkpoint's folder what was seen for the next draw."""
        if self._sees():
            counted = None if self._counter is None else (self._counted, self._counter.counted())
            write_seen(checkpoint, self._adapters, counted)

    def _trained(self) -> str:
        return ", ".join(sorted({adapter.config.trained for adapter in self._adapters}))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the optimizer's weight decay and the model as they were."""
        for adapter in self._adapters:
            adapter.sketch = None
        if self._decay is not None:
            self._decay.stop()
            self._decay = None
        if self._counter is not None:
            self._counter.stop()
            self._counter = None

    def _period_in_steps(self, args: TrainingArguments, dataloader: Any) -> int | None:
        if isinstance(self.every, int) or self.every == "never":
            return period_of(self.every, 1)
        batches = _length(dataloader)
        if batches is None:
            raise UserError(
                "the training data has no length, so an epoch has no number of steps: "
                "use RosaCallback(every='auto') or every=<optimizer steps>"
            )
        return period_of(self.every, max(-(-batches // args.gradient_accumulation_steps), 1))

    def _plan(self, steps: int) -> None:
        """Find the steps that begin with a draw."""
        auto = self.every == "auto"
        self._schedule = Schedule.of(self._adapters, self.period, self.first, auto, steps)

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
        ahead, first = self._schedule.ahead(step), self._schedule.first
        watched = self._schedule.watched if first is None or step <= first else 0
        if ahead is not None and (ahead == watched or (resumed and ahead < watched)):
            if watched:
                watch(model)
            goes_on = resumed and recall(self._seen, self._adapters)
            self._draw_at = step + (ahead if goes_on else watched)
        if step == self._draw_at:
            started = time.perf_counter()
            self.drawn += resample(model, optimizer, moments=self.moments)
            self.seconds += time.perf_counter() - started
            self.drawn_at.append(step)
            self._draws = [adapter.draws for adapter in self._adapters]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the layers that the first step did not use; find auto's period after a few."""
        self._stepped += 1
        self._counted += 1
        if self._stepped == 1:
            _warn_of_idle(self._adapters)
        if self._counted == COUNTED and self._counter is not None:
            counted, self._counter = self._counter.stop() / COUNTED, None
            examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.period = auto_period(trained_numbers(self._adapters), counted or examples)
            self._plan(state.max_steps)

    def forecast(self, model: Any, steps: int, steps_of_an_epoch: int, items: float) -> list[int]:
        """The steps of a training that would begin with a draw.

        Args:
            model: with ROSA adapters; may be on the meta device.
            steps: of the training.
            steps_of_an_epoch: of them.
            items: that a step shows, as "auto" counts them.
        """
        adapters = [a for _, layer in rosa_layers(model) for a in layer.adapters_in_use]
        auto = self.every == "auto"
        if auto:
            period: int | None = auto_period(trained_numbers(adapters), items)
        else:
            period = period_of(self.every, steps_of_an_epoch)
        schedule = Schedule.of(adapters, period, self.first, auto, steps)
        return [step for step in range(1, steps) if schedule.ahead(step) == 0]


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _check_saver() -> None:
    """Raise UserError where the Trainer's checkpoints would be none to go on from."""
    plugin: Any = AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
        raise UserError(
            "FSDP's SHARDED_STATE_DICT loads tensors of the sizes that are there, and ROSA's "
            "offset grows with the draws, so no checkpoint could be gone on from: set "
            "fsdp_state_dict_type to FULL_STATE_DICT (TrainingArguments(fsdp_config="
            "{'state_dict_type': 'FULL_STATE_DICT'}))"
        )


def _warn_of_idle(adapters: list[Adapter]) -> None:
    idle = [
        adapter.layer
        for adapter in adapters
        if all(f.grad is None for f in adapter.factors)
        and any(f.requires_grad for f in adapter.factors)
    ]
    if 0 < len(idle) < len(adapters):  # where none has a gradient, it is kept elsewhere
        warnings.warn(
            f"{len(idle)} of {len(adapters)} adapted layers got no gradient in the first step, "
            f"such as {', '.join(idle[:3])}: the model does not use them for these inputs "
            "(experts or a branch that was not taken), or uses them in a way that ROSA cannot "
            "see. Unless that is so, leave them out with exclude_modules",
            stacklevel=3,
        )


def _length(dataloader: Any) -> int | None:
    try:
        return len(dataloader)
    except TypeError:
        return None
