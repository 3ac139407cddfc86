"""Runs in processes of their own, several at a time, with a progress bar over all of them."""

from __future__ import annotations

import os
import shutil
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import TYPE_CHECKING, Any

from rosa.bench import runs
from rosa.bench.record import Record
from rosa.bench.settings import RunSettings
from rosa.bench.training import train

if TYPE_CHECKING:
    from rich.console import Console

ERROR = "error.txt"
_SECONDS = 0.5
"""How often the bar is brought up to date."""

_trained: Any = None
"""In a cell's process: the share of its steps that are done, seen by the parent."""


@dataclass(frozen=True)
class Job:
    """A run to be made; `variant` is what its record calls it."""

    settings: RunSettings
    variant: str

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.settings.output.name


@dataclass
class _Running:
    job: Job
    pool: ProcessPoolExecutor
    trained: Any


def run_all(todo: list[Job], jobs: int, title: str, console: Console) -> dict[str, str]:
    """Make runs, `jobs` at a time; returns why some failed, by name, with the trace in `ERROR`.

    Each has its share of the cores. One that was begun before goes on from its last checkpoint.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    failures: dict[str, str] = {}
    waiting, running = list(todo), dict[Future[Any], _Running]()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), MofNCompleteColumn())
    count = 0
    # One at a time shows the Trainer's own bar.
    bars = Progress(*columns, console=console, disable=jobs == 1 or not todo)
    with _or_none_goes_on(running), bars as progress:
        bar = progress.add_task(title, total=len(todo))
        while waiting or running:
            while waiting and len(running) < jobs:
                future, begun = _begin(waiting.pop(0), jobs)
                running[future] = begun
            done = wait(running, timeout=_SECONDS, return_when=FIRST_COMPLETED).done
            for future in done:
                ended = running.pop(future)
                count += 1
                place = f"[{count} of {len(todo)}] {ended.job.name}"
                if why := _failure(future, ended.job):
                    failures[ended.job.name] = why
                    console.print(f"{place}: FAILED, {why}", highlight=False, markup=False)
                else:
                    record = future.result()
                    score = f"{record.metric} {record.validation:.4f}"
                    console.print(f"{place}: validation {score}", highlight=False, markup=False)
                ended.pool.shutdown()
            progress.update(bar, completed=count + sum(r.trained.value for r in running.values()))
    return failures


@contextmanager
def _or_none_goes_on(running: dict[Future[Any], _Running]) -> Iterator[None]:
    """Stop the cells' processes with this one, and wait until each has saved the step it is in."""
    try:
        yield
    except BaseException:
        for process in active_children():
            process.terminate()
        for each in running.values():
            each.pool.shutdown(cancel_futures=True)
        raise


def _begin(job: Job, jobs: int) -> tuple[Future[Any], _Running]:
    # A process of its own: one that is killed takes no other with it, and its memory is its own.
    spawn = get_context("spawn")
    trained = spawn.Value("d", 0.0)
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_share, initargs=(trained,))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    threads = max(cores // jobs, 1) if cores else 0
    return pool.submit(_run, job, threads, jobs > 1), _Running(job, pool, trained)


def _failure(future: Future[Any], job: Job) -> str | None:
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, BrokenProcessPool):
        return "its process was killed (out of memory?)"
    job.settings.output.mkdir(exist_ok=True)
    trace = "".join(traceback.format_exception(error))
    (job.settings.output / ERROR).write_text(trace, encoding="utf-8")
    return f"{type(error).__name__}: {error}"


def _share(trained: Any) -> None:
    global _trained
    _trained = trained


def _run(job: Job, threads: int, quiet: bool) -> Record:
    import datasets
    from transformers import TrainerCallback
    from transformers.utils import logging

    class Share(TrainerCallback):
        """Tells the parent process how far the training is."""

        def on_step_end(self, args, state, control, **kwargs):
            _trained.value = state.global_step / state.max_steps

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
