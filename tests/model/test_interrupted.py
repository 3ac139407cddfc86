"""An interrupt (Ctrl-C) at any line of a change, and threads: the model stays whole."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import rosa
from rosa.layers.in_model import rosa_layers

PLACES = 40
"""Lines of each change at which it is interrupted, of many hundreds: others in each run."""
SOURCES = (str(Path(rosa.__file__).parent), contextlib.__file__, "tuners_utils.py")


class Lines:
    """Counts the lines that are run of ROSA, and may raise KeyboardInterrupt before one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.count, self.stop, self.place = 0, stop, ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return self.line if name.startswith(SOURCES[0]) or name.endswith(SOURCES[1:]) else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.stop:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.line

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def adapted(dtype: torch.dtype) -> PeftModel:
    """Two adapters, both trained and drawn anew; the first is active."""
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)
    config = rosa.RosaConfig(r=2, target_modules=["0", "2"], directions="orthonormal")
    tuned = get_peft_model(model, config)  # type: ignore[arg-type]  # any module does
    other = rosa.RosaConfig(r=3, target_modules=["0", "2"], directions="orthonormal", seed=7)
    tuned.add_adapter("other", other)
    for name in ("other", "default"):
        tuned.set_adapter(name)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        rosa.resample(tuned)
    return tuned


def hold(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


Act = Callable[[PeftModel], Any]
CHANGES: dict[str, tuple[Act, Act]] = {
    "draw": (rosa.resample, lambda model: None),
    "disable and enable": (hold, lambda model: None),
    "disable": (
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.enable_adapter_layers(),
    ),
    "switch": (lambda m: m.set_adapter("other"), lambda m: m.set_adapter("default")),
    "merge": (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
    "merge both": (lambda m: m.merge_adapter(["default", "other"]), lambda m: m.unmerge_adapter()),
}
CHANGES["enable"] = CHANGES["disable"][::-1]
CHANGES["unmerge"] = CHANGES["merge"][::-1]


def back(model: PeftModel, change: str) -> None:
    """Take a change back, whether or not it was made."""
    model.base_model.enable_adapter_layers()
    for _, layer in rosa_layers(model):
        if layer.merged:
            layer.unmerge()
    model.set_adapter("default")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_threads_that_change_one_model_leave_it_whole(dtype):
    model, x = adapted(dtype), torch.randn(4, 24, dtype=dtype)
    near = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 0.1}
    acts = [hold, hold, model.forward, lambda m: (m.set_adapter("other"), m.set_adapter("default"))]
    with torch.no_grad():
        before = model(x)
        with model.disable_adapter():
            pretrained = model(x)

        def work(act: Act) -> None:
            with torch.no_grad():
                for _ in range(15):
                    act(x if act == model.forward else model)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(len(acts)) as threads:
                done = [threads.submit(work, act) for act in acts]
        finally:
            sys.setswitchinterval(interval)
        for each in done:
            each.result()
        model.enable_adapter_layers()
        model.set_adapter("default")
        torch.testing.assert_close(model(x), before, **near)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), pretrained, **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_interrupted_anywhere_leaves_a_whole_model(dtype, change):
    act, undo = CHANGES[change]
    model, x = adapted(dtype), torch.randn(4, 24, dtype=dtype)
    near = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 0.1}
    with torch.no_grad():
        begin = undo if change in ("enable", "unmerge") else (lambda model: None)
        back(model, change)
        with model.disable_adapter():
            pretrained = model(x)
        begin(model)
        lines = Lines()
        before = model(x)
        with lines.watching():
            act(model)
        after = model(x)
        if dtype == torch.float64 and change in ("switch", "disable", "enable", "merge both"):
            assert (after - before).norm() > 0.01
        count = lines.count
        for stop in sorted(random.sample(range(1, count), min(PLACES, count - 1))):
            back(model, change)
            begin(model)
            lines = Lines(stop)
            with contextlib.suppress(KeyboardInterrupt), lines.watching():
                act(model)
            found = model(x)
            # In the last, before ROSA's own code was come to.
            whole = (before, after, *([pretrained] if change == "disable and enable" else []))
            same = [torch.allclose(found, each, **near) for each in whole]
            assert any(same), f"line {stop} of {count}, {lines.place}"
            trained = {layer.rosa_A["default"].requires_grad for _, layer in rosa_layers(model)}
            assert len(trained) == 1
            back(model, change)
            torch.testing.assert_close(model(x), before if begin is not undo else model(x), **near)
            with model.disable_adapter():
                torch.testing.assert_close(model(x), pretrained, **near)
