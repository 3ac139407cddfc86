"""An interrupt (Ctrl-C) at any line of a change, and threads: the model stays whole."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import rosa
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.weight import BaseWeight

PLACES = 40
"""Lines of each change at which it is interrupted, of many hundreds: others in each run.

Half of them where a `with` begins or ends, which hands over from one to the next.
"""
SOURCES = (str(Path(rosa.__file__).parent), contextlib.__file__, "tuners_utils.py")


class Lines:
    """Counts the lines that are run of ROSA, and may raise KeyboardInterrupt before one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.count, self.stop, self.place = 0, stop, ""
        self.between: list[int] = []  # which of them are of a `with`

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return self.line if name.startswith(SOURCES[0]) or name.endswith(SOURCES[1:]) else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if frame.f_code.co_filename == contextlib.__file__:
                self.between.append(self.count)
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


def adapted(dtype: torch.dtype, alone: bool = False) -> PeftModel:
    """Two adapters, or one alone, trained and drawn anew; the first is active."""
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)
    config = rosa.RosaConfig(r=2, target_modules=["0", "2"], directions="orthonormal")
    tuned = get_peft_model(model, config)  # type: ignore[arg-type]  # any module does
    other = rosa.RosaConfig(r=3, target_modules=["0", "2"], directions="orthonormal", seed=7)
    if not alone:
        tuned.add_adapter("other", other)
    for name in ("default",) if alone else ("other", "default"):
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


def switch_and_back(model: PeftModel) -> None:
    model.set_adapter("other")
    model.set_adapter("default")


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
for change, opposite in (("enable", "disable"), ("unmerge", "merge")):
    act, undo = CHANGES[opposite]
    CHANGES[change] = undo, act


def back(model: PeftModel) -> None:
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
    acts: list[Act] = [hold, hold, lambda m: m(x), switch_and_back]
    with torch.no_grad():
        before = model(x)
        with model.disable_adapter():
            pretrained = model(x)

        def work(act: Act) -> None:
            with torch.no_grad():
                for _ in range(15):
                    act(model)

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


class Reads(nn.Module):
    """Computes with its layer's weight, or by a method of the layer, and does not call it."""

    def __init__(self, method: bool) -> None:
        super().__init__()
        self.inner, self.method = nn.Linear(16, 16), method
        self.inner.twice = MethodType(lambda own, x: 2 * x @ own.weight.T, self.inner)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.twice(x) if self.method else x @ self.inner.weight.T  # type: ignore[operator]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsi,eio->bso", x, self.up)


@pytest.mark.parametrize("kind", ["attention", "experts", "linear", "weight", "method"])
def test_threads_that_run_one_model_compute_what_one_thread_does(kind):
    """One of them trains: its passes go backward, and the weights stay."""
    inner = {"attention": Attends, "experts": Experts, "linear": lambda: nn.Linear(16, 16)}
    base = nn.Sequential(inner.get(kind, lambda: Reads(kind == "method"))(), nn.Tanh())
    how: dict[str, Any] = {"target_modules": "0" if kind == "linear" else r".*inner"}
    if kind == "experts":
        how = {"target_modules": [], "target_parameters": ["0.up"]}
    model = get_peft_model(base, rosa.RosaConfig(r=2, directions="orthonormal", **how))  # type: ignore[arg-type]
    rosa.resample(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), model.disable_adapter():
        pretrained = model(x)
    wanted = model(x).detach()
    assert (wanted - pretrained).abs().max() > 1e-2

    def work(trains: bool) -> None:
        for _ in range(60):
            with torch.set_grad_enabled(trains):
                found = model(x)
            if trains:
                found.sum().backward()
            torch.testing.assert_close(found.detach(), wanted)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            done = [threads.submit(work, trains) for trains in (True, False, False)]
    finally:
        sys.setswitchinterval(interval)
    for each in done:
        each.result()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(x), pretrained)


FORKED = """
import os, threading, time, torch
from peft import get_peft_model
import rosa
from rosa.pretrained.weight import WRITING

config = rosa.RosaConfig(r=1, target_modules=["0"])
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
held, done = threading.Event(), threading.Event()

def hold():
    with WRITING:  # as who merges into another model
        held.set()
        done.wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()
if not (child := os.fork()):
    with model.disable_adapter():
        os._exit(0)
for _ in range(600):
    if os.waitpid(child, os.WNOHANG)[0]:
        os._exit(0)
    time.sleep(0.1)
os.kill(child, 9)
os._exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_forked_process_waits_for_no_thread_of_its_parent():
    """As a worker of a DataLoader, while another thread writes into a weight."""
    assert (
        subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=False).returncode == 0
    )


def test_a_deletion_that_is_interrupted_is_of_all_layers_or_none():
    x, count = torch.randn(4, 24, dtype=torch.float64), Lines()
    near = {"rtol": 0, "atol": 1e-9}
    with torch.no_grad(), count.watching():
        adapted(torch.float64).base_model.delete_adapter("default")
    for stop in random.sample(range(1, count.count), 2 * PLACES):
        model, lines = adapted(torch.float64).base_model, Lines(stop)
        with torch.no_grad():
            before = model(x)
            model.set_adapter("other")
            other = model(x)
            model.disable_adapter_layers()
            pretrained = model(x)
            model.enable_adapter_layers()
            model.set_adapter("default")
            with contextlib.suppress(KeyboardInterrupt), lines.watching():
                model.delete_adapter("default")
            stays = "default" in model.peft_config
            torch.testing.assert_close(
                model(x), before if stays else other, **near, msg=lines.place
            )
            model.disable_adapter_layers()
            torch.testing.assert_close(model(x), pretrained, **near, msg=lines.place)
            model.enable_adapter_layers()
            if stays:
                model.delete_adapter("default")
            torch.testing.assert_close(model(x), other, **near, msg=lines.place)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alone", [True, False])  # of one alone in float64 no copy is kept
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_interrupted_anywhere_leaves_a_whole_model(dtype, alone, change):
    if alone and change in ("switch", "merge both"):
        return
    act, undo = CHANGES[change]
    model, x = adapted(dtype, alone), torch.randn(4, 24, dtype=dtype)
    near = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 0.1}
    moves = change in ("switch", "disable", "enable", "merge both")
    with torch.no_grad():
        with model.disable_adapter():
            pretrained = model(x)
        adapts = model(x)
        begin: Act = undo if change in ("enable", "unmerge") else (lambda model: None)
        begin(model)
        before, lines = model(x), Lines()
        with lines.watching():
            act(model)
        after, count, between = model(x), lines.count, lines.between
        assert not moves or (after - before).abs().max() > 0.2
        stops = {*random.sample(range(1, count), min(PLACES // 2, count - 1))}
        stops |= {*random.sample(between, min(PLACES // 2, len(between)))}
        for stop in sorted(stops):
            back(model)
            begin(model)
            lines = Lines(stop)
            with contextlib.suppress(KeyboardInterrupt), lines.watching():
                act(model)
            found, place = model(x), f"line {stop} of {count}, {lines.place}"
            # In the last, before ROSA's own code was come to.
            whole = (before, after, *([pretrained] if change == "disable and enable" else []))
            assert any(torch.allclose(found, each, **near) for each in whole), place
            trained = {layer.rosa_A["default"].requires_grad for _, layer in rosa_layers(model)}
            assert len(trained) == 1, place
            back(model)
            for _ in range(2):  # and once more when all is drawn anew
                torch.testing.assert_close(model(x), adapts, **near, msg=place)
                with model.disable_adapter():
                    torch.testing.assert_close(model(x), pretrained, **near, msg=place)
                if dtype == torch.float64:  # in bfloat16 each draw rounds the model's outputs
                    rosa.resample(model)


def test_where_it_cannot_be_written_again_at_once_it_is_at_the_next_use(monkeypatch):
    model, x = adapted(torch.float64), torch.randn(4, 24, dtype=torch.float64)
    put, failed = BaseWeight.put, list[str]()

    def fails(self: BaseWeight, *args: Any) -> None:
        if self.name.endswith("2") and len(failed) < 2:
            failed.append(self.name)
            raise torch.OutOfMemoryError("no memory")
        put(self, *args)

    before = model(x)
    with pytest.raises(torch.OutOfMemoryError), model.disable_adapter():
        monkeypatch.setattr(BaseWeight, "put", fails)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)
    for change in (lambda: model.set_adapter("other"), model.merge_adapter):
        failed.clear()
        with pytest.raises(torch.OutOfMemoryError):
            change()
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)


def test_a_switch_that_fails_leaves_what_is_trained_as_it_was():
    model = adapted(torch.float64)
    model.requires_grad_(False)
    model.base_model.model[2].base_layer.weight.data.add_(1.0)
    with pytest.raises(rosa.errors.UserError, match="was changed while"):
        model.set_adapter("other")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_of_a_draw_that_cannot_be_made_of_one_layer_none_is_made():
    model = adapted(torch.float64)
    draws = [layer.adapters["default"].draws for _, layer in rosa_layers(model)]
    model.base_model.model[2].base_layer.weight.data.add_(1.0)
    with pytest.raises(rosa.errors.UserError, match="was changed while"):
        rosa.resample(model)
    assert draws == [layer.adapters["default"].draws for _, layer in rosa_layers(model)]


@pytest.mark.parametrize("by_layer", [True, False])
def test_what_a_state_dict_has_brought_is_in_force_after_a_switch_that_failed(
    by_layer, monkeypatch
):
    model, source = adapted(torch.float64), adapted(torch.float64)
    x = torch.randn(4, 24, dtype=torch.float64)
    model.load_state_dict({k: v.clone() for k, v in source.state_dict().items()})
    layers = [layer for _, layer in rosa_layers(model)]
    put = BaseWeight.put

    def fails(self: BaseWeight, wanted: Any, several: bool) -> None:
        put(self, wanted, several)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(BaseWeight, "put", fails)
    for switched in layers if by_layer else [model]:
        with pytest.raises(torch.OutOfMemoryError):
            switched.set_adapter("other")
    monkeypatch.undo()
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=1e-9)


def test_many_merges_between_forward_and_backward_do_no_harm():
    model, x = adapted(torch.float64), torch.randn(4, 24, dtype=torch.float64)
    model(x).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = model(x).sum()
    for _ in range(6):
        model.merge_adapter()
        model.unmerge_adapter()
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, wanted)


def test_states_that_cannot_come_back_are_not_held():
    model = adapted(torch.float32)
    layer = next(layer for _, layer in rosa_layers(model))
    gone = []
    for _ in range(3):
        gone.append(weakref.ref(layer.adapters["default"].terms))
        rosa.resample(model)
    gc.collect()
    assert [each() for each in gone] == [None] * 3


class Fails(torch.autograd.Function):
    """A backward pass that runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("no memory")


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.T


@pytest.mark.parametrize("then", ["disabled", "unloaded", "merged"])
def test_a_backward_pass_that_failed_leaves_nothing_in_the_module(then):
    module = Reading()
    net = nn.Sequential(nn.Linear(5, 5), module)
    config = rosa.RosaConfig(r=2, target_modules=[], target_parameters=["1.w"], directions="svd")
    x, pretrained = torch.randn(3, 5), module.w.detach().clone()
    model = get_peft_model(net, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    hidden = Fails.apply(net[0](x).requires_grad_())
    with pytest.raises(torch.OutOfMemoryError):
        net[1](hidden).sum().backward()
    after = model(x)
    with pytest.raises(torch.OutOfMemoryError):
        net[1](Fails.apply(net[0](x).requires_grad_())).sum().backward()
    if then == "merged":
        torch.testing.assert_close(model.merge_and_unload()(x), after)
        return
    with model.disable_adapter() if then == "disabled" else contextlib.nullcontext():
        plain = model if then == "disabled" else model.unload()
        expected = nn.functional.linear(net[0](x), pretrained)
        torch.testing.assert_close(plain(x), expected)


def test_an_offloaded_model_is_merged_after_a_merge_that_failed(monkeypatch):
    model, x = adapted(torch.float64), torch.randn(4, 24, dtype=torch.float64)
    before = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    put = BaseWeight.put

    def fails(self: BaseWeight, *args: Any) -> None:
        if self.name.endswith("2"):
            raise torch.OutOfMemoryError("no memory")
        put(self, *args)

    monkeypatch.setattr(BaseWeight, "put", fails)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_adapter()
    monkeypatch.undo()
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)


def test_an_adapter_is_saved_in_inference_mode(tmp_path):
    model = adapted(torch.float32)
    with torch.inference_mode():
        model.save_pretrained(tmp_path / "inside")
        state = model.state_dict()
    model.save_pretrained(tmp_path / "outside", state_dict=state)
    one, other = (
        load_file(tmp_path / p / "adapter_model.safetensors") for p in ("inside", "outside")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
