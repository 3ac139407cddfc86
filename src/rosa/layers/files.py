"""A pretrained weight in the file that it came from, instead of a copy of it in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rosa.errors import UserError


class WeightFile:
    """A tensor in a safetensors file; it is mapped, so it takes memory only where that is free.

    Args:
        path: the file's.
        key: the tensor's.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path.resolve()
        self.key = key
        self._state = _state(self.path)

    def check(self) -> None:
        """Raise UserError if the file is not there any more, or another."""
        if self._state is None or _state(self.path) != self._state:
            raise UserError(
                f"{self.path}, from which pretrained weights are read (rosa.map_pretrained), is "
                "gone or was changed: put it back as it was"
            )

    def read(self) -> Tensor:
        """The tensor, as it is stored; UserError as by `check`."""
        self.check()
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.key)

    def holds(self, weight: Tensor) -> bool:
        """Whether the tensor is this weight, to the last bit; False if the file is another now."""
        try:
            tensor = self.read()
        except UserError:
            return False
        same = tensor.dtype == weight.dtype and tensor.shape == weight.shape
        return same and torch.equal(tensor, weight.detach().cpu())


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
