"""The processes of one training, as `torchrun` or `accelerate launch` start them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(days=1)
"""How long processes wait for each other, as while one writes texts. None waits for a dead one."""


def join() -> Any:
    """Accelerate's `PartialState`: which process this is; the first call joins the others."""
    import torch
    from accelerate import PartialState

    alone = {} if count() == 1 else {"timeout": PATIENCE}
    return PartialState(cpu=not torch.accelerator.is_available(), **alone)


def count() -> int:
    """How many there are, without joining them."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Whether this is the one that speaks and writes, without joining the others."""
    return int(os.environ.get("RANK") or 0) == 0


def say(text: str) -> None:
    """Print a line, in the first process alone."""
    if is_first():
        print(text)
