"""Autograd's count of the changes of a weight that is changed and changed back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]

State = Mapping[str, object]  # what stands in the weight, by adapter; told apart by identity


class Versions:
    """Gives each state of a weight a version of its own, and a state that comes back its old one.

    Autograd refuses to go backward through a weight that was changed since the forward pass. That
    is right while the weight is another one, and wrong once it is what it was, as after a reference
    model's forward pass (`disable_adapter`, `set_adapter`) between the policy's forward and
    backward. The last few states are remembered; with an older one, autograd refuses.
    """

    def __init__(self) -> None:
        self._states: deque[tuple[State, int]] = deque(maxlen=4)
        self._seen: int | None = None
        self._highest = 0

    def leaving(self, weight: Tensor, state: State) -> None:
        """Note the state of a weight that is about to be changed."""
        if not _tracked(weight):
            return
        if self.changed_by_others(weight):
            self._states.clear()
        if self._version_of(state) is None:
            self._states.append((state, weight._version))
        self._highest = max(self._highest, weight._version)

    def arrived(self, weight: Tensor, state: State) -> None:
        """Set the version of a weight that was just changed to a state."""
        if not _tracked(weight):
            return
        version = self._version_of(state)
        if version is None:
            self._highest = version = max(self._highest, weight._version) + 1
            self._states.append((state, version))
        guard = _unsafe_preserve_version_counter(weight)
        guard.prev_versions = (version,)
        guard.__exit__()
        self._seen = weight._version

    def changed_by_others(self, weight: Tensor) -> bool:
        """Whether someone else has written into the weight since it last arrived at a state."""
        return _tracked(weight) and self._seen is not None and weight._version != self._seen

    def _version_of(self, state: State) -> int | None:
        return next((version for known, version in self._states if same_state(known, state)), None)


def same_state(one: State, other: State) -> bool:
    """Whether the very same things stand in the weight."""
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def _tracked(weight: Tensor) -> bool:
    return not weight.is_inference() and weight.device != torch.device("meta")
