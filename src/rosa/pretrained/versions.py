"""Autograd's count of the changes of a weight that is changed and changed back."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

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

    All methods take the parameter itself, not a view of it: it is known by its identity.
    """

    def __init__(self, of_written: bool = False) -> None:
        self._states: deque[tuple[State, int]] = deque(maxlen=4)
        self._seen: int | None = None
        self._highest = 0
        self._of: weakref.ref[Tensor] | None = None
        self._of_written = of_written  # a copy of a weight that others had written into

    def __reduce__(self) -> tuple[type[Versions], tuple[bool]]:
        """Of a copy: it belongs to another tensor, and begins anew."""
        weight = None if self._of is None else self._of()
        return Versions, (weight is not None and self.written(weight),)

    def copied(self, weight: Tensor, state: State) -> None:
        """Take note of the copied weight."""
        if self._of_written:
            self._seen, self._of = -1, weakref.ref(weight)
        else:
            self.arrived(weight, state)

    def leaving(self, weight: Tensor, state: State) -> None:
        """Note the state of a weight that is about to be changed."""
        if not _tracked(weight):
            return
        if self.written(weight):
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
        self._seen, self._of = weight._version, weakref.ref(weight)

    def is_new(self) -> bool:
        """Whether no state was arrived at yet."""
        return self._seen is None

    def written(self, weight: Tensor) -> bool:
        """Whether someone else has written into the parameter since it last arrived at a state."""
        return self._is(weight) and weight._version != self._seen

    def replaced(self, weight: Tensor) -> bool:
        """Whether another parameter stands where the one was that last arrived at a state."""
        return not self.is_new() and not self._is(weight)

    def _is(self, weight: Tensor) -> bool:
        return self._of is not None and self._of() is weight

    def _version_of(self, state: State) -> int | None:
        return next((version for known, version in self._states if same_state(known, state)), None)


def same_state(one: State, other: State) -> bool:
    """Whether the very same things stand in the weight."""
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


_CHANGED = (
    "the weight of a ROSA layer is not what it was in the forward pass: another adapter was made "
    "active, merged, disabled or drawn again before the backward pass, and the weight in memory "
    "belongs to one adapter at a time. Call backward on the loss of each adapter before you set "
    "another one (gradients add up)"
)


class Unchanged(torch.autograd.Function):
    """Hands its first argument on; going backward, says so if a weight is not what it was."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, weight: Tensor, standing: Callable[[], State] | None
    ) -> Tensor:
        """Keep the weight that `out` was computed with, and what stands in one that is no more."""
        ctx.save_for_backward(weight)
        ctx.standing, ctx.then = standing, None if standing is None else standing()
        ctx.mark_dirty(out)  # handed on as it is, not as a view that no one may change in place
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Look at the weight; the gradient goes on as it is."""
        unpack(ctx)
        if ctx.standing is not None and not same_state(ctx.then, ctx.standing()):
            raise RuntimeError(_CHANGED)
        return grads[0], None, None


def unpack(ctx: Any) -> tuple[Tensor, ...]:
    """What was kept for the backward pass; RuntimeError names what may have changed it since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(f"{_CHANGED}. Torch says: {error}") from error


def _tracked(weight: Tensor) -> bool:
    return not weight.is_inference() and weight.device != torch.device("meta")
