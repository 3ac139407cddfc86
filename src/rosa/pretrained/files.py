"""A pretrained weight in the file that it came from, instead of a copy of it in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
        self._digest = ""  # of what was compared with the weight

    def check(self) -> None:
        """Raise UserError if the file is not there any more, or holds another weight."""
        state = _state(self.path)
        if state == self._state and state is not None:
            return
        try:
            same = _digest(self._tensor()) == self._digest
        except (OSError, SafetensorError):
            same = False
        if not same:
            raise UserError(
                f"{self.path}, from which pretrained weights are read (rosa.map_pretrained), is "
                "gone or was changed: put it back as it was"
            )
        self._state = state

    def read(self) -> Tensor:
        """The tensor, as it is stored; UserError as by `check`."""
        self.check()
        return self._tensor()

    def holds(self, weight: Tensor, rounding: Tensor | None = None) -> bool:
        """Whether the tensor is this weight.

        Args:
            weight: in the shape and precision in which it is stored.
            rounding: how far each of its numbers may be off; None compares to the last bit.
        """
        weight = weight.detach().cpu()
        try:
            tensor = self._tensor()
        except (OSError, SafetensorError):
            return False
        if tensor.dtype != weight.dtype or tensor.shape != weight.shape:
            return False
        if rounding is None and not torch.equal(tensor, weight):
            return False
        if rounding is not None and ((tensor - weight).abs() > rounding.cpu()).any():
            return False
        self._digest = _digest(tensor)
        return True

    def _tensor(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.key)


def _digest(tensor: Tensor) -> str:
    numbers = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(numbers.data).hexdigest()


def _state(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
