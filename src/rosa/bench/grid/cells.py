"""Many runs, several at a time, with a progress bar over all of them."""

from __future__ import annotations

import traceback
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from rosa.bench.grid.cell import ERROR, Job
from rosa.bench.grid.executors import Executor
from rosa.bench.storage.record import Record

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS = 0.5
"""How often the bar is brought up to date."""


def run_all(todo: list[Job], executor: Executor, title: str, console: Console) -> dict[str, str]:
    """Make runs; returns why some failed, by name, with the trace in `ERROR`.

    One that was begun before goes on from its last checkpoint.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    failures: dict[str, str] = {}
    waiting, running = list(todo), dict[Future[Record], Job]()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), MofNCompleteColumn())
    count = 0
    # One at a time shows the Trainer's own bar.
    bars = Progress(*columns, console=console, disable=executor.jobs == 1 or not todo)
    try:
        with bars as progress:
            bar = progress.add_task(title, total=len(todo))
            while waiting or running:
                while waiting and len(running) < executor.jobs:
                    job = waiting.pop(0)
                    running[executor.begin(job)] = job
                done = wait(running, timeout=_SECONDS, return_when=FIRST_COMPLETED).done
                for made in done:
                    job = running.pop(made)
                    count += 1
                    place = f"[{count} of {len(todo)}] {job.name}"
                    if why := _failure(made, job, executor):
                        failures[job.name] = why
                        console.print(f"{place}: FAILED, {why}", highlight=False, markup=False)
                    else:
                        record = made.result()
                        score = f"{record.metric} {record.validation:.4g}"
                        console.print(f"{place}: validation {score}", highlight=False, markup=False)
                    executor.end(made)
                progress.update(bar, completed=count + executor.share())
    except BaseException:
        executor.stop()
        raise
    return failures


def _failure(made: Future[Record], job: Job, executor: Executor) -> str | None:
    raised = made.exception()
    if raised is None:
        return None
    error = executor.cause(raised)
    if error is None:
        return "its process was killed (out of memory?)"
    job.settings.output.mkdir(exist_ok=True)
    trace = "".join(traceback.format_exception(raised))
    (job.settings.output / ERROR).write_text(trace, encoding="utf-8")
    return f"{type(error).__name__}: {error}"
