"""The processes of a training: what they tell each other, and that they fail together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rosa.errors import UserError
from rosa.pretrained.sharding import are_several

T = TypeVar("T")
BUCKET = 64 << 20
"""Bytes that are sent at once: small tensors together, and no second copy of many."""


@dataclass(frozen=True)
class Team:
    """Some of the processes, that act together.

    Attributes:
        ranks: theirs, among all.
        place: of this process in it.
        group: torch's, of just these; None is all there are.
    """

    ranks: list[int]
    place: int = 0
    group: Any = None

    @property
    def is_alone(self) -> bool:
        """Whether this process is all of it."""
        return len(self.ranks) == 1

    def told(self, what: T) -> list[T]:
        """What each one says, in the order of their ranks.

        Raises:
            UserError: another one did not come, or has ended.
        """
        if self.is_alone:
            return [what]
        words: list[Any] = [None] * len(self.ranks)
        try:
            torch.distributed.all_gather_object(words, what, group=self.group)
        except RuntimeError as error:  # after the time that was given to torch's group
            raise UserError(
                f"the processes could not agree on a draw ({error}): one has ended, or did not "
                "come. Every process calls rosa.resample, at the same step"
            ) from error
        return words

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What fails in one process fails in all, and none waits for it.

        Raises:
            UserError: another one has failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            words = self.told(None if failure is None else str(failure))
        finally:
            if failure is not None:
                raise failure
        for rank, word in zip(self.ranks, words, strict=True):
            if word is not None:
                raise UserError(f"the draw has failed in process {rank}: {word}")

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Let each be its sum over the processes."""
        if not self.is_alone:
            _in_buckets(tensors, partial(torch.distributed.all_reduce, group=self.group))

    def send(self, tensors: Iterable[Tensor], place: int) -> None:
        """Let each be what it is in one of the processes."""
        if not self.is_alone:
            source = self.ranks[place]
            _in_buckets(tensors, partial(torch.distributed.broadcast, src=source, group=self.group))


def everyone() -> Team:
    """All processes; this one alone where there is no group."""
    if not are_several():
        return Team([0])
    return Team(list(range(torch.distributed.get_world_size())), torch.distributed.get_rank())


def _in_buckets(tensors: Iterable[Tensor], send: Callable[[Tensor], Any]) -> None:
    """Send tensors in few large pieces, and write into each what has become of it.

    Args:
        tensors: of any shapes, precisions and devices.
        send: changes a flat tensor in place, in all processes.
    """
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.dtype, tensor.device].append(tensor)
    for kind in alike.values():
        for bucket in _buckets(kind):
            flat = _sendable(torch.cat([tensor.flatten() for tensor in bucket]))
            send(flat)
            pieces = flat.split([tensor.numel() for tensor in bucket])
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))


def _sendable(tensor: Tensor) -> Tensor:
    """A tensor where a group can send it from: most know the memory of accelerators only."""
    accelerator = torch.accelerator.current_accelerator()
    elsewhere = accelerator is not None and torch.distributed.get_backend() != "gloo"
    return tensor.to(accelerator) if elsewhere and tensor.device.type == "cpu" else tensor


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
