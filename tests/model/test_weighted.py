"""Weighted sums of adapters: exact, and adapters like any other."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rosa import RosaConfig, resample
from rosa.layers.in_model import rosa_layers
from tests.models import Mlp

NAMES = ["first", "middle", "last"]


def trained_adapters(**second):
    """A model with adapters "default", "b" and "c", each of its own change of the weights."""
    model = get_peft_model(Mlp(), RosaConfig(r=2, directions="svd", target_modules=NAMES))
    model.add_adapter("b", RosaConfig(**{"r": 3, "target_modules": NAMES, "seed": 1, **second}))
    model.add_adapter("c", RosaConfig(r=1, target_modules=NAMES, directions="zero", alpha=3))
    for name in ("default", "b", "c"):
        model.set_adapter(name)
        for _ in range(2):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter))
            resample(model)
    return model


def changes(model, weights):
    return {
        name: sum(
            (w * layer.whole_change(a).dense() for a, w in weights.items() if a in layer.adapters),
            torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64),
        )
        for name, layer in rosa_layers(model)
    }


@pytest.mark.parametrize("kind", [{}, {"combination_type": "cat"}])
@pytest.mark.parametrize(
    "second",
    [
        {},
        {"target_modules": ["last"]},
        {"target_modules": "first|last", "directions": "orthonormal"},
        {"rank_pattern": {"first": 1, "last": 2}, "alpha": 5},
    ],
)
def test_the_change_is_the_weighted_sum_of_the_changes(kind, second, tmp_path):
    model, x = trained_adapters(**second), torch.randn(5, 7).double()
    for names in (["default", "b", "c"], ["b", "default"], ["b"], ["c", "c"]):
        weights = torch.randn(len(names)).tolist()
        expected = changes(model, {})
        for name, weight in zip(names, weights, strict=True):
            expected = {k: v + changes(model, {name: weight})[k] for k, v in expected.items()}
        before = model(x)
        model.add_weighted_adapter(names, weights, "sum", **kind)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        found = changes(model, {"sum": 1.0})
        for name, change in found.items():
            torch.testing.assert_close(change, expected[name], rtol=1e-9, atol=1e-9)
        model.set_adapter("sum")
        outputs = model(x)
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        model.set_adapter("c")
        model.delete_adapter("sum")
        torch.manual_seed(0)
        base = model.get_base_model()
        with model.disable_adapter():
            fresh = Mlp()
            pretrained = {
                n.replace(".base_layer", ""): p.clone()
                for n, p in base.named_parameters()
                if "rosa_" not in n
            }
            fresh.load_state_dict(pretrained)
        loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "sum"))
        torch.testing.assert_close(loaded(x), outputs)


def test_it_is_frozen_until_it_is_active_and_then_trains():
    model, x = trained_adapters(), torch.randn(5, 7).double()
    model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "sum")
    assert not [n for n, p in model.named_parameters() if p.requires_grad and ".sum" in n]
    assert model.peft_config["sum"].r == 3
    model.set_adapter("sum")
    factors = [p for n, p in model.named_parameters() if p.requires_grad]
    assert len(factors) == 6
    optimizer = torch.optim.AdamW(factors, 0.05)
    losses = []
    for number in range(40):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if number == 20:
            before = model(x)
            resample(model, optimizer)
            torch.testing.assert_close(model(x), before)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "d"], [1, 1], "sum"), "has no adapter 'd'; it has default, b, c"),
        ((["default", "b"], [1.0], "sum"), "2 adapters need as many weights, got 1"),
        ((["default"], [1.0], "b"), "already has an adapter 'b'"),
        ((["default"], [1.0], "sum", "svd"), "combination_type must be 'linear' or 'cat'"),
        (([], [], "sum"), "adapters must be a list of names"),
        (("default", [1.0], "sum"), "adapters must be a list of names"),
        ((["default"], [float("nan")], "sum"), "weights must be finite"),
        ((["default"], [1.0], "draws"), "cannot be named 'draws'"),
    ],
)
def test_what_cannot_be_summed_is_refused_and_nothing_changes(arguments, message):
    model, x = trained_adapters(), torch.randn(5, 7).double()
    before, keys = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default", "b", "c"]


@pytest.mark.parametrize("more", [{"density": 0.5}, {"svd_rank": 2, "density": None}])
def test_what_other_sums_take_is_refused_in_words(more):
    model = trained_adapters()
    name = next(iter(more))
    with pytest.raises(ValueError, match=f"add_weighted_adapter has no {name}: "):
        model.add_weighted_adapter(["default"], [1.0], "sum", **more)
    assert list(model.peft_config) == ["default", "b", "c"]
    model.add_weighted_adapter(["default"], [1.0], "sum", **dict.fromkeys(more))


def test_modules_trained_in_full_are_not_summed():
    config = RosaConfig(r=2, target_modules=["first"], modules_to_save=["last"])
    model = get_peft_model(Mlp(), config)
    with pytest.raises(ValueError, match="'default' trains modules or tokens"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    lora = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    assert not isinstance(lora.base_model, type(model.base_model))
