"""Autograd's count of the changes of a weight that is changed and changed back."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]

State = Mapping[str, object]  # what stands in the weight, by adapter; told apart by identity


class Versions:
    """Gives each state of a weight a version of its own, and a state that comes back its old one.

    Autograd refuses to go backward through a weight that was changed since the forward pass. That
    is right while the weight is another one, and wrong once it is what it was, as after a reference
    model's forward pass (`disable_adapter`, `set_adapter`) between the policy's forward and
    backward. The last few states are remembered, without what stood in them, which does not come
    back once it is gone; with an older one, autograd refuses.

    All methods take the parameter itself, not a view of it: it is known by its identity.
    """

    def __init__(self, of_written: bool = False) -> None:
        self._states: deque[tuple[dict[str, weakref.ref[object]], int]] = deque(maxlen=4)
        self._seen: int | None = None
        self._highest = 0
        self._of: weakref.ref[Tensor] | None = None
        self._of_written = of_written  # a copy of a weight that others had written into
        self._some: Tensor | None = None  # numbers of the weight, as it arrived

    def __reduce__(self) -> tuple[type[Versions], tuple[bool]]:
        """Of a copy: it belongs to another tensor, and begins anew."""
        if self._of is None:
            return Versions, (False,)
        weight = self._of()
        if weight is None:  # it is gone, and another in its place
            return Versions, (True,)
        self.look(weight)
        return Versions, (self.written(weight),)

    def copied(self, weight: Tensor, state: State) -> None:
        """Take note of the copied weight."""
        if self._of_written:
            self._seen, self._of, self._of_written = -1, weakref.ref(weight), False
        else:
            self.arrived(weight, state)

    def let_go(self, weight: Tensor, replaced: bool) -> None:
        """Hold nothing of a weight that is about to be moved, until `copied`."""
        self.look(weight)
        self._of_written, self._of = replaced or self.written(weight), None

    def leaving(self, weight: Tensor, state: State) -> None:
        """Note the state of a weight that is about to be changed."""
        if not is_counted(weight):
            return
        if self.written(weight):
            self._states.clear()
        if self._version_of(state) is None:
            self._remember(state, weight._version)
        self._highest = max(self._highest, weight._version)

    def arrived(self, weight: Tensor, state: State) -> None:
        """Set the version of a weight that was just changed to a state."""
        if not is_counted(weight):
            return
        version = self._version_of(state)
        if version is None:
            self._highest = version = max(self._highest, weight._version) + 1
            self._remember(state, version)
        guard = _unsafe_preserve_version_counter(weight)
        guard.prev_versions = (version,)
        guard.__exit__()
        self._seen, self._of = weight._version, weakref.ref(weight)
        self._some = _some_of(weight)

    def look(self, weight: Tensor) -> None:
        """Count what was written past autograd's count: through `.data`, numpy, or C.

        Told by some of the numbers, so what is written into few others is not found.
        """
        if self._some is None or not self._is(weight) or self.written(weight):
            return
        now = _some_of(weight)
        if now is None or (now.shape, now.dtype) != (self._some.shape, self._some.dtype):
            return  # cast or cut, as DeepSpeed does
        if not torch.equal(now, self._some.to(now.device)):
            self._seen = -1

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

    def _remember(self, state: State, version: int) -> None:
        self._states = deque(filter(_can_come_back, self._states), self._states.maxlen)
        self._states.append(({name: weakref.ref(each) for name, each in state.items()}, version))

    def _version_of(self, state: State) -> int | None:
        for known, version in self._states:
            if same_state({name: each() for name, each in known.items()}, state):
                return version
        return None


def _can_come_back(remembered: tuple[dict[str, weakref.ref[object]], int]) -> bool:
    return all(each() is not None for each in remembered[0].values())


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


SOME = 8
"""Numbers that are looked at along each side of a weight."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Of a number of so many bytes: NaN is equal to itself then."""


def _some_of(weight: Tensor) -> Tensor | None:
    """A copy of some of a weight's numbers, as bits; None of what is no ordinary tensor."""
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return None
    steps = tuple(slice(size // (2 * SOME), None, -(-size // SOME) or 1) for size in weight.shape)
    return weight.detach()[steps].contiguous().view(BITS[weight.element_size()]).clone()


def is_counted(weight: Tensor) -> bool:
    """Whether autograd counts its changes."""
    return not weight.is_inference() and weight.device != torch.device("meta")
