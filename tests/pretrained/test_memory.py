"""Weights that someone else holds are left as they are."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import PeftModel, get_peft_model

from rosa import RosaConfig, resample
from rosa.pretrained.memory import make_private, tenants
from tests.models import Mlp, tiny_bert, tiny_gpt2

IDS = torch.randint(1, 50, (3, 9))


def attach(base):
    return get_peft_model(base, RosaConfig(r=2, target_modules="all-linear"))


def assigned(base):
    other = type(base)(base.config)
    other.load_state_dict(base.state_dict(), assign=True)
    return other


def of_the_same_parameters(base):
    other = type(base)(base.config)
    for name, module in other.named_modules():
        for key in module._parameters:
            setattr(module, key, base.get_submodule(name)._parameters[key])
    return other


def of_views(base):
    other = copy.deepcopy(base)
    for name, parameter in other.named_parameters():
        parameter.data = base.get_parameter(name).data
    return other


@pytest.mark.parametrize("make", [assigned, of_the_same_parameters, of_views])
@pytest.mark.parametrize("build", [tiny_bert, lambda: tiny_gpt2(tied=False)])
def test_a_model_on_the_same_memory_is_left_as_it_is(make, build):
    base = build().eval()
    other = make(base).eval()
    expected = other(IDS).logits
    model = attach(base)
    resample(model)
    torch.testing.assert_close(other(IDS).logits, expected, rtol=0, atol=0)
    second = attach(other)  # and the other way round
    resample(second)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hold", [lambda m: m.state_dict(), lambda m: dict(m.named_parameters())])
def test_weights_that_someone_keeps_stay_the_pretrained_ones(hold):
    base = tiny_bert()
    kept = hold(base)
    expected = copy.deepcopy(kept)
    resample(attach(base))
    assert all(torch.equal(kept[name], value) for name, value in expected.items())


def test_an_adapter_loaded_onto_weights_that_someone_keeps_leaves_them_in_memory(tmp_path):
    base = tiny_bert().eval()
    kept, fresh = base.state_dict(), copy.deepcopy(base)
    expected = copy.deepcopy(kept)
    model = attach(fresh)
    resample(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert all(torch.equal(kept[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": "all-linear"},
        {"target_modules": [], "target_parameters": ["query.weight", "value.weight"]},
    ],
)
def test_weights_that_no_one_else_holds_are_changed_where_they_are(targets):
    base = tiny_bert()
    gc.collect()
    places = {n: p.data_ptr() for n, p in base.named_parameters()}
    model = get_peft_model(base, RosaConfig(r=2, **targets))
    for name, parameter in model.get_base_model().named_parameters():
        if name.endswith("base_layer.weight"):
            assert parameter.data_ptr() == places[name.replace("base_layer.", "")]


def test_weights_that_lie_in_one_block_of_their_own_model_are_not_copied():
    base = Mlp()
    block = torch.cat([p.detach().flatten() for p in base.parameters()])
    begin = 0
    for parameter in base.parameters():
        parameter.data = block[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()
    place = base.first.weight.data_ptr()
    there = tenants(base)
    del block, parameter
    make_private(base.first, "weight", there)
    assert base.first.weight.data_ptr() == place
    held = base.first.weight.detach()
    make_private(base.first, "weight", there)
    assert base.first.weight.data_ptr() != held.data_ptr()
