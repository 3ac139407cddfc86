"""Real processes of one group, on this machine."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

without_gloo = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


def free_port() -> int:
    """One of this machine's that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(count: int, folder: Path, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(rank, *args)`` in each of some processes; fails if it fails in one."""
    # Forked from one process that has imported all this once, and has done nothing else.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.models"])
    multiprocessing.start_processes(
        _begin,
        (count, str(folder / "store"), work, args),
        nprocs=count,
        daemon=True,
        start_method="forkserver",
    )


def _begin(rank: int, count: int, store: str, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    ranks, sizes = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict.fromkeys(ranks, str(rank)) | dict.fromkeys(sizes, str(count))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"  # is not used
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count
    )
    work(rank, *args)
    # A wrapper's reducer must not be the last to hold the group: its destructor waits, with
    # Python's lock, for a thread that wants that lock to let go of its last tensors.
    gc.collect()
    distributed.destroy_process_group()


def fsdp_on_cpus() -> None:
    """Let Accelerate set FSDP up on CPUs, which it does on accelerators alone."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def told_otherwise(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = told_otherwise


def all_equal(mine: torch.Tensor) -> bool:
    """Whether a tensor is the same in all processes, to the last bit."""
    found = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, mine)
    return all(torch.equal(found[0], other) for other in found)
