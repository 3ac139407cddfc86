"""One cell of a comparison: a run that is made in whatever process it is put into."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from rosa.bench.setup.checking import NOT_RESUMED
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import models, runs
from rosa.bench.storage.record import Record
from rosa.bench.train.preparing import load_task
from rosa.bench.train.training import train

ERROR = "error.txt"
"""Why a cell failed, in its folder."""

Told = Callable[[float], None]
"""Is called with the share of a run's steps that are done."""


def _check_model(base: RunSettings) -> None:
    models.check_model(base.model)
    load_task(base)


def _by_trainer(settings: RunSettings, variant: str, told: Told) -> Record:
    from transformers import TrainerCallback

    class Share(TrainerCallback):
        """Tells how far the training is."""

        def on_step_end(self, args, state, control, **kwargs):
            told(state.global_step / state.max_steps)

    begun = bool(runs.settings_of(settings.output))
    again = begun and settings.method in NOT_RESUMED
    how = {"resume": begun and not again, "overwrite": again}
    record = train(settings, variant=variant, callbacks=[Share()], **how)
    shutil.rmtree(settings.output / runs.CHECKPOINTS, ignore_errors=True)  # the run is finished
    return record


@dataclass(frozen=True)
class Kind:
    """How the runs of a comparison are made.

    Attributes:
        check: raises for what all cells share, before anything is trained, if it is of no use.
        train: makes a run of its settings, of what its record calls it, and of what it tells its
            progress to; one that was begun before goes on, or begins again.
    """

    check: Callable[[RunSettings], None]
    train: Callable[[RunSettings, str, Told], Record]


MODELS = Kind(_check_model, _by_trainer)
"""Pretrained models, as `rosa train` trains them."""


@dataclass(frozen=True)
class Job:
    """A run to be made; `variant` is what its record calls it."""

    settings: RunSettings
    variant: str
    kind: Kind = MODELS

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.settings.output.name


def make(job: Job, threads: int, quiet: bool, told: Told) -> Record:
    """Make a run in this process.

    Args:
        job: the run.
        threads: to compute with; 0 leaves them as they are.
        quiet: whether progress bars are off.
        told: see `Told`.
    """
    import datasets
    from transformers.utils import logging

    if threads:
        _use_threads(threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # as in the command itself
    if quiet:
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    (job.settings.output / ERROR).unlink(missing_ok=True)
    return job.kind.train(job.settings, job.variant, told)


def _use_threads(count: int) -> None:
    """Compute with as many threads in this process: torch, and SciPy's own linear algebra too."""
    import scipy.linalg  # noqa: F401  # what is not loaded yet is not limited
    import torch
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    torch.set_num_threads(count)
    threadpool_limits(count)
