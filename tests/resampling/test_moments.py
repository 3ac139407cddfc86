"""An optimizer's moments over a draw: kept, cleared."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from rosa import RosaConfig, resample
from rosa.layers.in_model import rosa_layers
from tests.models import Mlp


def adapted():
    model = get_peft_model(Mlp(), RosaConfig(r=2, directions="svd", target_modules=["first"]))
    return model, [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 7).double()).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("moments", ["clear", "keep"])
def test_what_a_resample_does_to_them(moments):
    model, factors = adapted()
    optimizer = torch.optim.AdamW(factors, amsgrad=True)
    step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    resample(model, optimizer, moments=moments)
    now = optimizer.state_dict()["state"]
    if moments == "clear":
        assert not now
    else:
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    step(model, optimizer)


def test_an_unknown_word_is_refused_before_anything_is_drawn():
    model, factors = adapted()
    optimizer = torch.optim.RMSprop(factors)
    step(model, optimizer)
    with pytest.raises(ValueError, match="moments must be one of clear, keep; got 'drop'"):
        resample(model, optimizer, moments="drop")
    assert all(layer.adapters["default"].draws == 1 for _, layer in rosa_layers(model))
