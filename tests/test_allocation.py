"""Ranks by weight, where the loss gradient lies."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from rosa import RosaConfig, allocate_ranks
from rosa.allocation import _fill
from rosa.model import rosa_layers
from tests.models import Mlp, tiny_bert

NAMES = ["first", "middle", "last"]


def loss_of(model, x):
    return model(x).square().mean()


def test_the_most_energy_for_its_cost_comes_first_while_there_is_room():
    spectra = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([9.0, 8.0, 1.0])}
    assert _fill({"a": 10, "b": 10}, spectra, 2) == {"a": 2, "b": 2}
    assert _fill({"a": 10, "b": 30}, spectra, 2) == {"a": 3, "b": 1}
    assert _fill({"a": 10, "b": 10}, spectra, 1) == {"a": 1, "b": 1}


def test_a_weight_with_all_of_the_gradient_gets_the_ranks_that_others_spare():
    """Through a layer of zeros no gradient comes to the two before it."""
    model = Mlp()
    with torch.no_grad():
        model.last.weight.zero_()
    before = copy.deepcopy(model.state_dict())
    config = RosaConfig(r=2, target_modules=NAMES)
    x = torch.randn(8, 7).double()
    ranks = allocate_ranks(model, config, [x], lambda m, x: (m(x) * x[:, :3]).sum())
    assert ranks["^last"] == 3  # all that it can have
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [type(module).__name__ for module in model.children()] == ["Linear", "Conv1D", "Linear"]
    assert config.rank_pattern == {}


def test_the_ranks_are_those_of_the_adapter_within_the_same_number_of_parameters():
    base = tiny_bert()
    config = RosaConfig(r=4, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    ids = torch.randint(50, (8, 6))
    batches = [{"input_ids": ids[i::2], "labels": ids[i::2, 0] % 2} for i in range(2)]
    ranks = allocate_ranks(base, config, batches)
    even = get_peft_model(copy.deepcopy(base), config)
    config.rank_pattern = ranks
    model = get_peft_model(base, config)
    found = {}
    for name, layer in rosa_layers(model):
        name = name.removeprefix("base_model.model.")
        (key,) = (k for k in ranks if k == "^" + name.replace(".", r"\."))
        found[name] = layer.r["default"]
        assert layer.r["default"] == ranks[key]
    assert len(set(found.values())) > 1

    def numbers(model):
        return sum(layer.r["default"] * sum(layer.weight.shape) for _, layer in rosa_layers(model))

    assert 0.9 * numbers(even) < numbers(model) <= numbers(even)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_batches_without_a_gradient_are_refused_and_the_model_is_left_as_it_was(value):
    model = Mlp()
    config = RosaConfig(r=2, target_modules=NAMES)
    with pytest.raises(ValueError, match="the batches gave no gradient to allocate ranks by"):
        allocate_ranks(
            model, config, [torch.randn(4, 7).double()], lambda m, x: loss_of(m, x) * value
        )
    with pytest.raises(ValueError, match="a batch gave no loss"):
        allocate_ranks(model, config, [torch.randn(4, 7).double()], lambda m, x: None)
    assert [type(module).__name__ for module in model.children()] == ["Linear", "Conv1D", "Linear"]
