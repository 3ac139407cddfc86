"""The processes of one training, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rosa.errors import UserError

PATIENCE = timedelta(days=1)
"""How long processes wait for each other, as while one writes texts. None waits for a dead one."""


def join() -> Any:
    """Accelerate's `PartialState`: which process this is; the first call joins the others.

    Raises:
        UserError: `accelerate launch` has set them up for what a training alone does.
    """
    import torch
    from accelerate import PartialState

    for name in ("FSDP", "DEEPSPEED"):
        asked = is_told(f"ACCELERATE_USE_{name}")
        if asked and not torch.distributed.is_initialized():  # later Accelerate sets it itself
            raise UserError(
                f"accelerate launch is set up for {name}, which is for rosa train: launch this "
                "with torchrun, or with another --config_file"
            )
    alone = {} if count() == 1 else {"timeout": PATIENCE}
    state = PartialState(cpu=not torch.accelerator.is_available(), **alone)
    if state.num_processes != count():
        raise UserError(
            f"{state.num_processes} processes were started by a launcher that does not say so in "
            "WORLD_SIZE, as mpirun: start them by torchrun or accelerate launch"
        )
    return state


def is_told(name: str) -> bool:
    """Whether the environment, by which Accelerate tells its processes, says yes to a name."""
    return os.environ.get(name, "").strip().lower() in ("true", "1")


def count() -> int:
    """How many there are, without joining them."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched() -> bool:
    """Whether this process was started as one of a training's, be it the only one."""
    return "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is the one that speaks and writes, without joining the others."""
    return int(os.environ.get("RANK") or 0) == 0


def say(text: str) -> None:
    """Print a line, in the first process alone."""
    if is_first():
        print(text)


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Let a request to end (SIGTERM) end this by an exception, which cleans up what was begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def peak_memory_mib() -> float:
    """The most memory so far in MiB: of the device if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
