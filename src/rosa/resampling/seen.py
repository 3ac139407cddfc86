"""What was seen for a draw to come, in a checkpoint: a resumed run draws as it would have."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rosa.layers.adapter import Adapter
from rosa.resampling.processes import everyone

FILE = "rosa_seen.safetensors"
_COUNTED, _PROCESSES = "counted", "processes"


def write_seen(folder: Path, adapters: list[Adapter], counted: tuple[int, float] | None) -> None:
    """Write what the sketches hold, and how many items were counted in how many steps.

    Called by all data-parallel processes, whose sketches are summed; the first one writes.

    Args:
        folder: a checkpoint's.
        adapters: those that are watched have a sketch.
        counted: steps, and this process's items in them; None if nothing is being counted.
    """
    found = {_key(a): a.sketch.total.clone() for a in adapters if a.sketch is not None}
    if counted is not None:
        found[_COUNTED] = torch.tensor(counted, dtype=torch.float64)
    everyone().add_up(total[1:] if key == _COUNTED else total for key, total in found.items())
    if found and everyone().place == 0 and folder.is_dir():
        partial = folder / f"{FILE}.partial"
        found[_PROCESSES] = torch.tensor(len(everyone().ranks))
        save_file({key: total.cpu() for key, total in found.items()}, partial)
        os.replace(partial, folder / FILE)


def read_seen(folder: Path) -> dict[str, Tensor]:
    """What `write_seen` has written; empty if it has not."""
    return load_file(folder / FILE) if (folder / FILE).is_file() else {}


def recall(seen: dict[str, Tensor], adapters: list[Adapter]) -> bool:
    """Put into the sketches of watched adapters what they held; whether it is all there."""
    sketches = {_key(a): a.sketch for a in adapters if a.sketch is not None}
    if not sketches or not sketches.keys() <= seen.keys():
        return False
    # Each of more processes sees larger gradients, whose mean is a step's.
    now = len(everyone().ranks)
    factor = now / float(seen.get(_PROCESSES, now))
    for key, sketch in sketches.items():
        if everyone().place == 0:  # what all have seen is summed before a draw
            sketch.total.copy_(seen[key] * factor)
    return True


def recall_count(seen: dict[str, Tensor]) -> tuple[int, float]:
    """How many steps were counted, and the items in them."""
    steps, items = seen.get(_COUNTED, torch.zeros(2)).tolist()
    return int(steps), items if everyone().place == 0 else 0.0


def _key(adapter: Adapter) -> str:
    return f"{adapter.layer}.{adapter.name}"
