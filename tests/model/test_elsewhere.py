"""Modules that are held outside of the model too, and that outlive their layers."""

from __future__ import annotations

import copy
import gc
import os
import types
import warnings
from collections import deque
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from rosa import RosaConfig
from rosa.errors import UserError
from rosa.layers.in_model import rosa_layers
from tests.model.test_odd_models import attach, close, plain_of, trained
from tests.models import tiny_gpt2


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 4))
        self.down = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up.T) @ self.down


class Kinds(nn.Module):
    """A module of each kind; each is called with what `inputs` says."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.linear = nn.Linear(4, 4)
        self.kernel = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embedding(ids))
        x = self.kernel(x.mT).mT
        return self.experts(self.attention(x, x, x)[0])


KINDS = ["embedding", "linear", "kernel", "attention", "experts"]
CONFIG: dict[str, Any] = {
    "targets": ["embedding", "linear", "kernel", "attention"],
    "target_parameters": ["experts.up", "experts.down"],
}


def inputs(kind: str) -> tuple[Tensor, ...]:
    x = torch.randn(2, 4, 4).double()
    ids = torch.randint(9, (2, 4))
    return {"embedding": (ids,), "attention": (x, x, x)}.get(kind, (x,))


def first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


class Plain:
    """No module, and has one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


@pytest.mark.parametrize("holder", ["model", "object", "deque", "method", "closure"])
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_else_holds_a_module_keeps_the_pretrained_one(kind, holder):
    base, ids, given = Kinds().double(), torch.randint(9, (2, 4)), inputs(kind)
    bare = copy.deepcopy(base)

    def hold(module: Any) -> Any:
        if holder == "model":
            return nn.ModuleDict({"it": module})["it"].__call__
        if holder == "object":
            kept = Plain(module)
            return lambda *args: kept.module(*args)
        if holder == "deque":
            many = deque([module])
            return lambda *args: many[0](*args)
        return module.forward if holder == "method" else (lambda *args: module(*args))

    call = hold(getattr(base, kind))
    before, out = first(call(*given)), base(ids)
    model = attach(base, **CONFIG)
    close(model(ids), out)
    close(first(call(*given)), before)
    model = trained(model.unload(), **CONFIG)
    close(model(ids), plain_of(model, bare)(ids))
    close(first(call(*given)), before)
    model.merge_and_unload()
    close(first(call(*given)), before)


def identities(base: nn.Module) -> set[int]:
    return {id(module) for module in base.modules()}


def test_a_module_that_nobody_else_holds_is_not_copied(tmp_path):
    config = RosaConfig(r=2, target_modules="all-linear")
    base = tiny_gpt2()
    known = identities(base)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    assert {id(layer.base_layer) for _, layer in rosa_layers(model)} <= known
    for load in (
        lambda base: PeftModel.from_pretrained(base, tmp_path),
        lambda base: PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True),
        lambda base: base.load_adapter(str(tmp_path)),
        lambda base: inject_adapter_in_model(config, base),
    ):
        base = tiny_gpt2()
        known = identities(base)
        weights = {p.data_ptr() for p in base.parameters()}
        load(base)
        layers = [layer for _, layer in rosa_layers(base)]
        assert layers
        assert {id(layer.base_layer) for layer in layers} <= known
        assert {layer.base_weight.parameter.data_ptr() for layer in layers} <= weights


def test_a_module_with_a_forward_that_holds_it_is_not_copied_and_that_is_said():
    base, ids = Kinds().double(), torch.randint(9, (2, 4))
    base.kernel.forward = types.MethodType(type(base.kernel).forward, base.kernel)
    out = base(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(attach(copy.deepcopy(base), **CONFIG)(ids), out)  # it alone is no holder
    others = nn.Sequential(base.kernel)
    with pytest.warns(UserWarning, match="kernel is held outside of the model too"):
        model = attach(base, **CONFIG)
    close(model(ids), out)
    del others


def test_memory_that_other_processes_share_is_not_changed():
    base, ids = Kinds().share_memory(), torch.randint(9, (2, 4))
    out = base(ids).detach()
    (reads, tells), (hears, says) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            os.read(reads, 1)
            with torch.no_grad():
                os.write(says, str(float((base(ids) - out).abs().max())).encode())
        finally:
            os._exit(0)
    model = trained(base, **CONFIG)
    os.write(tells, b"x")
    assert float(os.read(hears, 100)) == 0.0
    os.waitpid(child, 0)
    assert float((model(ids) - out).abs().max()) > 1e-3


# -- dropped -----------------------------------------------------------------------------------


def stripped(model: nn.Module) -> None:
    """As diffusers takes adapters off."""
    for name, layer in reversed(list(rosa_layers(model))):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_that_is_dropped_takes_its_offset_with_it(dtype, copied):
    base = Kinds().to(dtype)
    bare = copy.deepcopy(base)
    model = trained(base, **CONFIG)
    if copied:
        model = copy.deepcopy(model)
    plain = model.base_model.model
    stripped(plain)
    gc.collect()
    assert not list(rosa_layers(plain))
    close_to = {torch.bfloat16: 0.0, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    there = dict(plain.named_parameters())
    for name, parameter in bare.named_parameters():
        torch.testing.assert_close(there[name], parameter, rtol=0, atol=close_to)


def test_what_is_merged_stays():
    base, ids = Kinds().double(), torch.randint(9, (2, 4))
    model = trained(base, **CONFIG)
    out = model(ids)
    model.merge_adapter()
    plain = model.base_model.model
    stripped(plain)
    close(plain(ids), out)


def test_replicas_of_data_parallel_training_take_nothing_with_them():
    model, ids = trained(Kinds().double(), **CONFIG), torch.randint(9, (2, 4))
    out = model(ids)
    for _, layer in rosa_layers(model):
        layer._replicate_for_data_parallel()  # and drop it
        copy.copy(layer)
    gc.collect()
    close(model(ids), out)


def test_a_dropped_layer_does_not_undo_what_others_wrote():
    model = trained(Kinds().double(), ["linear"])
    base = model.base_model.model.linear.base_layer
    with torch.no_grad():
        base.weight.fill_(1.0)
    with pytest.warns(UserWarning, match="layer linear was dropped without unload"):
        stripped(model.base_model.model)
    assert (base.weight == 1).all()


def test_a_scale_of_one_may_be_set_and_no_other():
    model, ids = trained(Kinds().double(), **CONFIG), torch.randint(9, (2, 4))
    out = model(ids)
    for _, layer in rosa_layers(model):
        layer.set_scale("default", 1.0)
        layer.scale_layer(1)
        layer.unscale_layer()
        with pytest.raises(UserError, match=r"has no scale to set.*add_weighted_adapter"):
            layer.scale_layer(0.5)
        with pytest.raises(UserError, match="has no scale to set"):
            layer.set_scale("default", 0)
    close(model(ids), out)
