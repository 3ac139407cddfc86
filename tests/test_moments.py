"""An optimizer's moments over a draw: projected, kept, cleared."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from rosa import RosaConfig, resample
from rosa.linear import rosa_layers
from rosa.moments import clear, project
from tests.models import Mlp

OUT, IN, R = 9, 7, 3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def moments_of(a, b, gradients):
    """Adam's means over gradients of the weight, as factors A and B see them."""
    found = {}
    for factor, seen in ((a, [b.T @ g for g in gradients]), (b, [g @ a.T for g in gradients])):
        seen = torch.stack(seen)
        found[factor] = {
            "exp_avg": seen.mean(0),
            "exp_avg_sq": seen.square().mean(0),
            "step": torch.tensor(5.0),
        }
    return found


def test_within_the_same_subspace_the_mean_is_the_new_factors_own():
    a, b = randn(R, IN), randn(OUT, R)
    gradients = randn(4, OUT, IN)
    state = moments_of(a, b, gradients)
    old_a, old_b = a.clone(), b.clone()
    a.copy_(randn(R, R) @ old_a)
    b.copy_(old_b @ randn(R, R))
    project(state, a, b, old_a, old_b)
    expected = moments_of(a, b, gradients)
    for factor in (a, b):
        torch.testing.assert_close(state[factor]["exp_avg"], expected[factor]["exp_avg"])
        assert state[factor]["step"] == 5


def test_directions_in_another_order_and_size_have_their_own_squares():
    a, b = randn(R, IN), randn(OUT, R)
    gradients, order = randn(4, OUT, IN), torch.randperm(R)
    sizes = randn(R)
    state = moments_of(a, b, gradients)
    old_a, old_b = a.clone(), b.clone()
    a.copy_(sizes[:, None] * old_a[order])
    b.copy_(old_b[:, order] * sizes)
    project(state, a, b, old_a, old_b)
    expected = moments_of(a, b, gradients)
    for factor in (a, b):
        torch.testing.assert_close(state[factor], expected[factor])


def test_of_unseen_directions_the_mean_is_zero_and_the_square_an_average():
    basis = torch.linalg.qr(randn(OUT, OUT)).Q
    a, b = randn(R, IN), basis[:, :R].clone()
    state = moments_of(a, b, randn(4, OUT, IN))
    average = state[a]["exp_avg_sq"].mean()
    old_a, old_b = a.clone(), b.clone()
    b.copy_(basis[:, R : 2 * R])
    project(state, a, b, old_a, old_b)
    torch.testing.assert_close(state[a]["exp_avg"], torch.zeros_like(a))
    torch.testing.assert_close(state[a]["exp_avg_sq"], average.expand_as(a).contiguous())


def adapted():
    model = get_peft_model(Mlp(), RosaConfig(r=2, directions="svd", target_modules=["first"]))
    return model, [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer):
    optimizer.zero_grad()
    model(randn(4, 7)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("moments", ["clear", "keep", "project"])
def test_what_a_resample_does_to_them(moments):
    model, factors = adapted()
    optimizer = torch.optim.AdamW(factors, amsgrad=True)
    step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    resample(model, optimizer, moments=moments)
    now = optimizer.state_dict()["state"]
    if moments == "clear":
        assert not now
        return
    assert now.keys() == before.keys()
    for number, entry in now.items():
        assert entry["step"] == before[number]["step"]
        same = torch.equal(entry["exp_avg"], before[number]["exp_avg"])
        assert same == (moments == "keep")
        assert (entry["exp_avg_sq"] > 0).all()
        assert (entry["max_exp_avg_sq"] > 0).all()
    step(model, optimizer)


def test_of_terms_that_go_the_mean_is_zero_and_the_square_the_mean_of_those_that_stay():
    a, b, lasts = randn(R, IN), randn(OUT, R), torch.tensor([True, False, True])
    state = moments_of(a, b, randn(4, OUT, IN))
    before = copy.deepcopy([state[a], state[b].copy()])
    clear(state, a, b, lasts)
    for factor, old in zip((a, b), before, strict=True):
        new = state[factor]
        assert new["step"] == 5
        for name in ("exp_avg", "exp_avg_sq"):
            rows, were = (v[name].T if factor is b else v[name] for v in (new, old))
            torch.testing.assert_close(rows[lasts], were[lasts], rtol=0, atol=0)
            fresh = were[lasts].mean() if name == "exp_avg_sq" else 0.0
            torch.testing.assert_close(rows[1], torch.zeros_like(rows[1]) + fresh)
    clear(state, a, b, ~lasts & lasts)
    assert not state


def test_moments_of_another_kind_are_dropped_whole():
    model, factors = adapted()
    optimizer = torch.optim.RMSprop(factors)
    step(model, optimizer)
    clear(optimizer.state, *factors, torch.tensor([True, False]))
    assert not optimizer.state


def test_moments_of_another_kind_are_refused_before_anything_is_drawn():
    model, factors = adapted()
    optimizer = torch.optim.RMSprop(factors)
    step(model, optimizer)
    with pytest.raises(ValueError, match="this one holds square_avg of shape"):
        resample(model, optimizer, moments="project")
    with pytest.raises(ValueError, match="moments must be one of clear, keep, project; got 'drop'"):
        resample(model, optimizer, moments="drop")
    assert all(layer.rosa_offset["default"].draws == 1 for _, layer in rosa_layers(model))
