"""A training that can be stopped at any moment: by a signal, by a full disk, by a crash."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rosa.bench.processes import is_first
from rosa.bench.storage import checkpoints, models
from rosa.bench.train.averaging import MeanTrainer

_STOPPING = b"\nstopping: the step is ended and saved first (once more stops at once)\n"


class Stopped(KeyboardInterrupt):
    """A training was stopped by a signal, and all of it is in a checkpoint.

    Attributes:
        code: what the process is to exit with.
    """

    def __init__(self, asked: int, step: int) -> None:
        super().__init__(asked, step)  # which another process makes it of again
        self.code = 128 + asked

    def __str__(self) -> str:
        step = self.args[1]
        return f"stopped after step {step}, which is saved: the same command with --resume goes on"


class Stopper(AbstractContextManager["Stopper"]):
    """Notes a signal to stop (SIGTERM, Ctrl-C), so that the step can end and be saved.

    The same once more stops at once. Outside the main thread, where Python hears no signals, it
    hears none.

    Attributes:
        asked: the signal that came; None if none did.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.asked == number:
            raise KeyboardInterrupt
        if self.asked is not None:  # a terminal's and a parent's, of one wish
            return
        self.asked = number
        if is_first():  # not by print: the signal may have come in the middle of one
            with suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), _STOPPING)


class Clock(TrainerCallback, ExportableState):
    """Seconds of training, those before a resumed run's checkpoint too."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on from what the checkpoint says."""
        saved = (state.stateful_callbacks or {}) if state.global_step else {}
        self.seconds = saved.get(type(self).__name__, {}).get("attributes", {}).get("seconds", 0.0)
        self._started = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop counting."""
        self.seconds, self._started = self._now(), time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoints hold of it."""
        return {"args": {}, "attributes": {"seconds": self._now()}}

    def _now(self) -> float:
        return self.seconds + time.perf_counter() - self._started


class SurvivingTrainer(MeanTrainer):
    """Whose checkpoints are whole or not there, and which a signal stops at a step's end.

    Raises:
        Stopped: a signal came; all until the end of its step is in a checkpoint.
        OSError, RuntimeError: a checkpoint could not be written, as the disk is full; nothing of it
            is left, and the one before is as it was.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stopper: Stopper | None = None
        self._ended = 0  # the last step so far that ended an epoch
        self._asked: int | None = None  # the signal to stop, of which all processes know

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        self._asked = None
        with Stopper() as self._stopper:
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which would train a step more after a checkpoint of the last one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size  # of a step, however it is split
            return _SeededByEpoch(sampler, self)
        return sampler

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, at each step's end; then a checkpoint is whole, and older ones go.

        At the end of an epoch it is called once more, to evaluate: only then it stops.
        """
        step, last = self.state.global_step, self.state.max_steps
        self._asked = self._asked or self._is_to_stop()
        self.control.should_save |= self._asked is not None
        is_called_again = self._ended == step
        if float(self.state.epoch or 0).is_integer() or step >= last:
            self._ended = step
        waits = self._ended == step and not is_called_again
        stopping = None if waits else self._asked
        saves = self.control.should_save
        with _or_give_up(self._checkpoint):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if saves:
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoints.finish(self._checkpoint, self.state.best_model_checkpoint)
                self.accelerator.wait_for_everyone()
        if stopping is not None:
            raise Stopped(stopping, self.state.global_step)

    def _is_to_stop(self) -> int | None:
        """The signal that came to any of the processes, at the same step for all of them."""
        asked = None if self._stopper is None else self._stopper.asked
        if self.accelerator.num_processes == 1:
            return asked
        if asked is not None:
            self.accelerator.set_trigger()
        return asked or signal.SIGTERM if self.accelerator.check_trigger() else None

    @property
    def _checkpoint(self) -> Path:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        return Path(self.args.output_dir) / name  # type: ignore[arg-type]  # a run gives one

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            checkpoints.begin(self._checkpoint)
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save and isinstance(self.model, PeftModel):  # as beside any adapter
            models.save_config(self.model.config, self._checkpoint)


class _SeededByEpoch(Sampler[int]):
    """Batches of like length in an order that depends on seed and epoch alone, as any other's does.

    The Trainer's own depends on all random numbers before it, which a resumed run has not drawn.
    """

    def __init__(self, inner: LengthGroupedSampler, trainer: Trainer) -> None:
        self.inner, self.trainer = inner, trainer

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        self.inner.generator = torch.Generator().manual_seed(self.trainer.args.seed + epoch)
        return iter(self.inner)


@contextmanager
def _or_give_up(checkpoint: Path) -> Iterator[None]:
    """Remove what was written of a checkpoint if the rest cannot be."""
    try:
        yield
    except Exception:
        checkpoints.give_up(checkpoint)
        raise
