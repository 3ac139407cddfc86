"""Where the cells of a comparison are made: processes of this machine, or Ray's machines."""

from __future__ import annotations

import logging
import os
import signal
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from typing_extensions import override  # comes with torch

from rosa.bench.grid.cell import Job, make
from rosa.bench.storage.record import Record
from rosa.errors import UserError

_PATIENCE = 60
"""Seconds that a stopped cell has to save the step that it is in."""

_trained: Any = None
"""In a cell's process: the share of its steps that are done, seen by the parent."""


@dataclass
class Executor(ABC):
    """Makes runs, `jobs` of them at a time."""

    jobs: int

    @abstractmethod
    def begin(self, job: Job) -> Future[Record]:
        """Begin a run, in a process of its own: one that is killed takes no other with it."""

    def share(self) -> float:
        """Of the runs under way, the shares of their steps that are done, added up."""
        return 0.0

    def end(self, made: Future[Record]) -> None:  # noqa: B027
        """What a run that has ended leaves behind goes."""

    @abstractmethod
    def stop(self) -> None:
        """End what is under way, when each has saved the step that it is in."""

    @abstractmethod
    def close(self) -> None:
        """Nothing is under way any more."""

    @staticmethod
    @abstractmethod
    def cause(error: BaseException) -> BaseException | None:
        """What went wrong in a run; None if its process ended without a word."""


@dataclass
class Processes(Executor):
    """Processes of this machine, each with its share of the cores."""

    running: dict[Future[Record], tuple[ProcessPoolExecutor, Any]] = field(default_factory=dict)

    @override
    def begin(self, job: Job) -> Future[Record]:
        spawn = get_context("spawn")
        trained = spawn.Value("d", 0.0)
        pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_share, initargs=(trained,))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        threads = max(cores // self.jobs, 1) if cores else 0
        # One at a time shows the Trainer's own bar.
        made = pool.submit(_make_here, job, threads, self.jobs > 1)
        self.running[made] = pool, trained
        return made

    @override
    def share(self) -> float:
        return sum(trained.value for _, trained in self.running.values())

    @override
    def end(self, made: Future[Record]) -> None:
        pool, _ = self.running.pop(made)
        pool.shutdown()

    @override
    def stop(self) -> None:
        for pool, _ in self.running.values():
            for process in list((pool._processes or {}).values()):  # none other of the caller's
                process.terminate()
            pool.shutdown(cancel_futures=True)

    @override
    def close(self) -> None:
        pass

    @staticmethod
    @override
    def cause(error: BaseException) -> BaseException | None:
        return None if isinstance(error, BrokenProcessPool) else error


def _share(trained: Any) -> None:
    global _trained
    _trained = trained


def _make_here(job: Job, threads: int, quiet: bool) -> Record:
    def told(share: float) -> None:
        _trained.value = share

    return make(job, threads, quiet, told)


@dataclass
class Ray(Executor):
    """Tasks of Ray: of a cluster if there is one (`ray start`, RAY_ADDRESS), else of this machine.

    A cell has a GPU where there are any, and its share of the cores. All machines must see the
    comparison's folder, the model and the data at the same paths.

    Raises:
        UserError: the cluster cannot be reached, or has nothing to compute on.
    """

    running: dict[Future[Record], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A task without a GPU keeps what it sees of them, as Ray will have it in time.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._is_ours = not ray.is_initialized()
        ended = signal.getsignal(signal.SIGTERM)
        if self._is_ours:
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"--executor ray: no cluster can be reached: {error}") from error
        if threading.current_thread() is threading.main_thread() and callable(ended):
            signal.signal(signal.SIGTERM, ended)  # Ray's own would abort this process
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        has_gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
        if not cores:
            raise UserError("--executor ray: the cluster has no machine with a core to compute on")
        self._threads = max(min(sum(cores) // self.jobs, min(cores)), 1)
        self._make = ray.remote(
            num_cpus=self._threads, num_gpus=int(has_gpus), max_retries=0, max_calls=1
        )(_make_there)

    @override
    def begin(self, job: Job) -> Future[Record]:
        task = self._make.remote(job, self._threads, os.getcwd())
        made = task.future()
        self.running[made] = task
        return made

    @override
    def end(self, made: Future[Record]) -> None:
        del self.running[made]

    @override
    def stop(self) -> None:
        import ray

        tasks = [*self.running.values()]
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=_PATIENCE)
        self.close()

    @override
    def close(self) -> None:
        if self._is_ours:
            import ray

            ray.shutdown()

    @staticmethod
    @override
    def cause(error: BaseException) -> BaseException | None:
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        if isinstance(error, (NodeDiedError, OutOfMemoryError, WorkerCrashedError)):
            return None
        return getattr(error, "cause", None) or error


def _make_there(job: Job, threads: int, folder: str) -> Record:
    place = Path(folder)
    if not (place / job.settings.output).parent.is_dir():
        raise UserError(
            f"the machine {os.uname().nodename} does not see {place / job.settings.output.parent}: "
            "run from a folder that all of Ray's machines share, and write there"
        )
    os.chdir(place)  # paths are from where the command was given
    return make(job, threads, quiet=True, told=lambda share: None)


def find_executor(name: str) -> type[Executor]:
    """An executor by its name; UserError if there is none, or what it needs is not installed."""
    if name not in EXECUTORS:
        raise UserError(f"executor must be one of {', '.join(EXECUTORS)}, got {name!r}")
    if name == "ray" and find_spec("ray") is None:
        raise UserError("--executor ray needs Ray: run pip install 'rosa-finetune[ray]'")
    return EXECUTORS[name]


EXECUTORS: dict[str, type[Executor]] = {"processes": Processes, "ray": Ray}
"""By the names of `--executor`."""
