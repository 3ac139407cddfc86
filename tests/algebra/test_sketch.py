"""Informed directions: the sketch against the full gradient, and every way of gathering it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from rosa import RosaConfig, resample, watch
from rosa.algebra.sketch import Sketch
from rosa.algebra.subspace import generator
from rosa.layers.in_model import rosa_layers
from tests.helpers import seen_by
from tests.models import Mlp, tiny_bert

NAMES = ["first", "middle", "last"]


def adapted(**options):
    config = {"r": 2, "directions": "gradient", "target_modules": NAMES, **options}
    return get_peft_model(Mlp().double(), RosaConfig(**config))


def loss_of(model, x):
    return model(x).square().mean()


def low_rank_gradient(out_features, in_features, sizes):
    u = torch.linalg.qr(torch.randn(out_features, len(sizes)).double()).Q
    v = torch.linalg.qr(torch.randn(in_features, len(sizes)).double()).Q
    return u, u * torch.tensor(sizes).double() @ v.T


def sketch_of(gradient, rank, passes=3):
    """A sketch that saw a gradient as a sum of passes, none of which shows it."""
    out_features, in_features = gradient.shape
    like = torch.empty(0).double()
    sketch = Sketch((out_features, in_features), rank, generator(0, "layer", 0), like)
    rest = gradient
    for number in range(passes):
        part = torch.randn_like(gradient) if number < passes - 1 else rest
        rest = rest - part
        sketch.add(part.T.reshape(1, in_features, out_features), torch.eye(in_features).double())
    return sketch


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_a_gradient_of_low_rank_is_found_exactly(shape):
    u, gradient = low_rank_gradient(*shape, [5.0, 3.0, 0.1])
    found = sketch_of(gradient, 3).directions(3, like=gradient)
    torch.testing.assert_close(found @ found.T, u @ u.T)


def test_the_sketch_keeps_nearly_all_that_the_best_directions_hold():
    decaying = [0.7**k for k in range(20)]
    shares = []
    for _ in range(50):  # on average 0.989, of one draw give or take 0.009
        u, gradient = low_rank_gradient(30, 20, decaying)
        found = sketch_of(gradient, 4).directions(4, like=gradient)
        best = (u[:, :4].T @ gradient).norm()
        shares.append(float((found.T @ gradient).norm() / best))
    assert sum(shares) / len(shares) > 0.98
    assert max(shares) <= 1 + 1e-9


def weights_gradients(model, x):
    """The full gradient of every adapted weight, by autograd."""
    layers = dict(rosa_layers(model))
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers.values()]
    gradients = torch.autograd.grad(loss_of(model, x), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {
        name: gradient.T if layer.base_weight.view.transposed else gradient
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True)
    }


def check_against(model, gradients):
    """Every layer's B spans the left singular directions of its gradient."""
    for name, layer in rosa_layers(model):
        b = torch.linalg.qr(layer.rosa_B["default"].detach()).Q
        best = torch.linalg.svdvals(gradients[name])[: b.shape[1]].norm()
        assert (b.T @ gradients[name]).norm() > 0.95 * best, name


def test_watched_backward_passes_find_the_full_gradients_directions():
    """The loss is over so few rows that every gradient is of the rank drawn, and is found whole."""
    model, x = adapted(), torch.randn(2, 7).double()
    before = model(x)
    gradients = weights_gradients(model, x)
    assert watch(model) == 3
    loss_of(model, x).backward()
    resample(model)
    check_against(model, gradients)
    torch.testing.assert_close(model(x), before)
    assert all(seen_by(layer) is None for _, layer in rosa_layers(model))


def test_batches_find_the_same_and_leave_gradients_alone():
    model, x = adapted(), torch.randn(2, 7).double()
    gradients = weights_gradients(model, x)
    factors = [p for p in model.parameters() if p.requires_grad]
    loss_of(model, torch.randn(3, 7).double()).backward()
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    resample(model, batches=[x[:1], x[1:]], loss=loss_of)
    check_against(model, gradients)
    assert all(p.grad is None for p in factors)  # the factors' own, by the draw


@pytest.mark.parametrize("kind", [torch.stack, iter, lambda b: DataLoader(Stream(b), None)])
def test_batches_of_any_kind_find_the_same(kind):
    model, x = adapted(), torch.randn(2, 7).double()
    gradients = weights_gradients(model, x)
    resample(model, batches=kind([x[:1], x[1:]]), loss=loss_of)
    check_against(model, gradients)


class Stream(IterableDataset):
    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def test_batches_of_a_model_that_computes_its_own_loss():
    model = get_peft_model(
        tiny_bert(),
        RosaConfig(r=2, directions="gradient", target_modules=["query"], task_type="SEQ_CLS"),
    )
    ids = torch.randint(50, (4, 6))
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    head.grad = torch.ones_like(head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resample(model, batches=[{"input_ids": ids, "labels": ids[:, 0] % 2}]) > 0
    assert torch.equal(head.grad, torch.ones_like(head))


@pytest.mark.parametrize("way", ["reentrant", "checkpointed", "accumulated", "autocast"])
def test_every_way_of_training_shows_the_same(way):
    inputs = torch.randn(4, 7).double()
    sums = []
    for how in ("plain", way):
        torch.manual_seed(0)
        model = adapted()
        watch(model)
        if how == "accumulated":
            for row in inputs:
                (loss_of(model, row[None]) / len(inputs)).backward()
        elif how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss_of(model, inputs).backward()
        elif how == "plain":
            loss_of(model, inputs).backward()
        else:
            x = inputs.clone().requires_grad_()
            out = checkpoint(model, x, use_reentrant=how == "reentrant")
            out.square().mean().backward()
        sums.append([seen_by(layer).total for _, layer in rosa_layers(model)])
    tolerance = 0.1 if way == "autocast" else 1e-12
    for one, other in zip(*sums, strict=True):
        assert (one - other).norm() <= tolerance * one.norm()
        assert one.any()


def test_nothing_is_watched_without_gradients():
    model = adapted()
    watch(model)
    with torch.no_grad():
        model(torch.randn(2, 7).double())
    assert not any(seen_by(layer).total.any() for _, layer in rosa_layers(model))


def test_watching_changes_neither_outputs_nor_gradients():
    model, x = adapted(), torch.randn(4, 7).double()
    factors = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss_of(model, x), factors)
    watch(model)
    torch.testing.assert_close(torch.autograd.grad(loss_of(model, x), factors), expected)


def test_a_model_in_eval_mode_is_looked_at_and_left_in_it():
    base, x = Mlp().double(), torch.randn(5, 7).double()
    draws = []
    for training in (True, False):
        config = RosaConfig(r=2, directions="gradient", target_modules=NAMES)
        model = get_peft_model(copy.deepcopy(base), config).train(training)
        with torch.no_grad():  # as an evaluation is written
            resample(model, batches=[x], loss=loss_of)
        assert model.training == training
        draws.append([layer.rosa_B["default"].detach() for _, layer in rosa_layers(model)])
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)


def test_the_same_seed_draws_the_same():
    base, x, draws = Mlp().double(), torch.randn(5, 7).double(), []
    for seed in (1, 1, 2):
        config = RosaConfig(r=2, directions="gradient", seed=seed, target_modules=NAMES)
        model = get_peft_model(copy.deepcopy(base), config)
        resample(model, batches=[x[:1]], loss=loss_of)  # one direction, and a random one
        draws.append([layer.rosa_A["default"].detach().clone() for _, layer in rosa_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))


def test_draws_after_the_first_that_are_not_watched_are_random_and_nothing_is_said():
    base, x = Mlp().double(), torch.randn(5, 7).double()
    factors = {}
    for directions in ("gradient", "orthonormal"):
        config = RosaConfig(r=2, directions=directions, target_modules=NAMES)
        model = get_peft_model(copy.deepcopy(base), config)
        resample(model, batches=[x], loss=loss_of)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resample(model)
        layers = [layer.adapters["default"] for _, layer in rosa_layers(model)]
        factors[directions] = [factor for adapter in layers for factor in adapter.factors]
    for drawn, random in zip(*factors.values(), strict=True):
        torch.testing.assert_close(drawn, random)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_no_gradient_is_said_once_and_random_directions_are_drawn(value):
    model, x = adapted(), torch.randn(4, 7).double()
    before = model(x)
    with pytest.warns(UserWarning, match="no gradient was seen of 3 of 3 weights") as found:
        resample(model, batches=[x], loss=lambda model, x: loss_of(model, x) * value)
    assert len(found) == 1
    torch.testing.assert_close(model(x), before)
    assert all(torch.isfinite(layer.rosa_A["default"]).all() for _, layer in rosa_layers(model))


def test_a_pass_that_overflows_is_left_out():
    x = torch.randn(2, 7).double()
    model = adapted()
    watch(model)
    loss_of(model, x).backward()
    good = [seen_by(layer).total.clone() for _, layer in rosa_layers(model)]
    (loss_of(model, x) * float("inf")).backward()
    for (_, layer), expected in zip(rosa_layers(model), good, strict=True):
        torch.testing.assert_close(seen_by(layer).total, expected)


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([torch.ones(2, 7).double()], None, "a batch is a Tensor"),
        ({"input_ids": torch.ones(2, 7)}, None, r"batches is a list of batches: .*\[batch\]"),
        ([torch.ones(2, 7).double()], lambda m, x: None, "gave no loss"),
        ([torch.ones(2, 7).double()], lambda m, x: loss_of(m, x).detach(), "gave no loss"),
    ],
)
def test_batches_of_no_use_are_refused_and_nothing_changes(batches, loss, message):
    model = adapted()
    before = [layer.adapters["default"].draws for _, layer in rosa_layers(model)]
    with pytest.raises(ValueError, match=message):
        resample(model, batches=batches, loss=loss)
    assert [layer.adapters["default"].draws for _, layer in rosa_layers(model)] == before
    assert all(seen_by(layer) is None for _, layer in rosa_layers(model))


def test_other_directions_are_not_watched():
    model = adapted(directions="orthonormal")
    assert watch(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resample(model, batches=[torch.randn(2, 7).double()], loss=loss_of)
