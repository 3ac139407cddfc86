"""One cell of a comparison: a run that is made in whatever process it is put into."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from rosa.bench import runs
from rosa.bench.record import Record
from rosa.bench.settings import RunSettings
from rosa.bench.training import train

ERROR = "error.txt"
"""Why a cell failed, in its folder."""


@dataclass(frozen=True)
class Job:
    """A run to be made; `variant` is what its record calls it."""

    settings: RunSettings
    variant: str

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.settings.output.name


def make(job: Job, threads: int, quiet: bool, told: Callable[[float], None]) -> Record:
    """Make a run in this process, on from its last checkpoint if it was begun before.

    Args:
        job: the run.
        threads: to compute with; 0 leaves them as they are.
        quiet: whether progress bars are off.
        told: is called with the share of its steps that are done.
    """
    import datasets
    from transformers import TrainerCallback
    from transformers.utils import logging

    class Share(TrainerCallback):
        """Tells how far the training is."""

        def on_step_end(self, args, state, control, **kwargs):
            told(state.global_step / state.max_steps)

    if threads:
        _use_threads(threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # as in the command itself
    if quiet:
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    settings = job.settings
    (settings.output / ERROR).unlink(missing_ok=True)
    begun = bool(runs.settings_of(settings.output))
    record = train(settings, resume=begun, variant=job.variant, callbacks=[Share()])
    shutil.rmtree(settings.output / runs.CHECKPOINTS, ignore_errors=True)  # the run is finished
    return record


def _use_threads(count: int) -> None:
    """Compute with as many threads in this process: torch, and SciPy's own linear algebra too."""
    import scipy.linalg  # noqa: F401  # what is not loaded yet is not limited
    import torch
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    torch.set_num_threads(count)
    threadpool_limits(count)
