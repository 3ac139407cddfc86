"""Informed directions: the sketch against the full gradient, and every way of gathering it."""

from __future__ import annotations

import copy
import warnings
from importlib import import_module

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from rosa import RosaConfig, resample, watch
from rosa.linear import rosa_layers
from rosa.sketch import Sketch
from rosa.subspace import generator
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


def sketch_of(gradient, rank, left=True, passes=3):
    """A sketch that saw a gradient as a sum of passes, none of which shows it."""
    out_features, in_features = gradient.shape
    like = torch.empty(0).double()
    ranks = {"left": rank, "right": 0} if left else {"right": rank}
    sketch = Sketch(out_features, in_features, ranks, generator(0, "layer", 0), like)
    rest = gradient
    for number in range(passes):
        part = torch.randn_like(gradient) if number < passes - 1 else rest
        rest = rest - part
        sketch.add(part.T.reshape(1, in_features, out_features), torch.eye(in_features).double())
    return sketch


@pytest.mark.parametrize("left", [True, False])
def test_a_gradient_of_low_rank_is_found_exactly(left):
    u, gradient = low_rank_gradient(30, 20, [5.0, 3.0, 0.1])
    found = sketch_of(gradient, 3, left).directions(
        "left" if left else "right", 3, 0.0, generator(0, "draw", 0)
    )
    best = u if left else torch.linalg.svd(gradient)[2][:3].T
    torch.testing.assert_close(found @ found.T, best @ best.T)


def test_the_sketch_keeps_nearly_all_that_the_best_directions_hold():
    decaying = [0.7**k for k in range(20)]
    shares = []
    for _ in range(10):
        u, gradient = low_rank_gradient(30, 20, decaying)
        found = sketch_of(gradient, 4).directions("left", 4, 0.0, generator(0, "draw", 0))
        best = (u[:, :4].T @ gradient).norm()
        shares.append(float((found.T @ gradient).norm() / best))
    assert sum(shares) / len(shares) > 0.97
    assert max(shares) <= 1 + 1e-9


def test_temperature_goes_from_greedy_to_blind():
    u, gradient = low_rank_gradient(30, 20, [8.0, 4.0, 2.0, 1.0])
    sketch = sketch_of(gradient, 4)
    sketch.sums["left"] = gradient.T  # without the noise of the projection

    def taken(temperature):
        counts = torch.zeros(4)
        for number in range(400):
            (column,) = sketch.directions("left", 1, temperature, generator(0, "draw", number)).T
            counts[(u.T @ column).abs().argmax()] += 1
        return counts / 400

    assert taken(0.0).tolist() == [1, 0, 0, 0]
    # In proportion to the energies 64, 16, 4, 1 (within four standard errors of 400 draws).
    torch.testing.assert_close(
        taken(1.0), torch.tensor([64, 16, 4, 1]) / 85, rtol=0, atol=4 * (0.25 / 400) ** 0.5
    )
    torch.testing.assert_close(taken(1e6), torch.full((4,), 0.25), rtol=0, atol=0.1)


def weights_gradients(model, x):
    """The full gradient of every adapted weight, by autograd."""
    layers = dict(rosa_layers(model))
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers.values()]
    gradients = torch.autograd.grad(loss_of(model, x), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {
        name: gradient.T if layer.fan_in_fan_out else gradient
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True)
    }


def check_against(model, gradients, side="left"):
    """Every layer's B spans the left singular directions of its gradient, or A the right ones."""
    for name, layer in rosa_layers(model):
        if side == "both":  # one of two directions each
            b = torch.linalg.qr(layer.rosa_B["default"].detach()[:, :1]).Q
            a = torch.linalg.qr(layer.rosa_A["default"].detach()[1:].T).Q
            best = torch.linalg.svdvals(gradients[name])[0]
            assert (b.T @ gradients[name]).norm() > 0.95 * best, name
            assert (gradients[name] @ a).norm() > 0.95 * best, name
            continue
        if side == "right":
            a = torch.linalg.qr(layer.rosa_A["default"].detach().T).Q
            best = torch.linalg.svdvals(gradients[name])[: a.shape[1]].norm()
            assert (gradients[name] @ a).norm() > 0.95 * best, name
            continue
        b = torch.linalg.qr(layer.rosa_B["default"].detach()).Q
        best = torch.linalg.svdvals(gradients[name])[: b.shape[1]].norm()
        assert (b.T @ gradients[name]).norm() > 0.95 * best, name


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_watched_backward_passes_find_the_full_gradients_directions(side):
    """The loss is over so few rows that every gradient is of the rank drawn, and is found whole."""
    rows = 1 if side == "both" else 2  # of which each takes one direction
    model, x = adapted(side=side), torch.randn(rows, 7).double()
    before = model(x)
    gradients = weights_gradients(model, x)
    assert watch(model) == 3
    loss_of(model, x).backward()
    resample(model)
    check_against(model, gradients, side)
    torch.testing.assert_close(model(x), before)
    assert all(layer.watched("default") is None for _, layer in rosa_layers(model))


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
        sums.append([layer.watched("default").sums["left"] for _, layer in rosa_layers(model)])
    tolerance = 0.1 if way == "autocast" else 1e-12
    for one, other in zip(*sums, strict=True):
        assert (one - other).norm() <= tolerance * one.norm()
        assert one.any()


def test_nothing_is_watched_without_gradients():
    model = adapted()
    watch(model)
    with torch.no_grad():
        model(torch.randn(2, 7).double())
    assert not any(layer.watched("default").sums["left"].any() for _, layer in rosa_layers(model))


def test_watching_changes_neither_outputs_nor_gradients():
    model, x = adapted(), torch.randn(4, 7).double()
    factors = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss_of(model, x), factors)
    watch(model)
    torch.testing.assert_close(torch.autograd.grad(loss_of(model, x), factors), expected)


def spectrum(weight):
    """Left and right singular vectors, as columns."""
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return {"left": u, "right": vh.T}


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_informed_triplets_are_those_that_hold_most_of_the_gradient(side):
    """Against the full gradient; its rank is below the sketch's, so the order is found exactly."""
    options = {"side": side, "informed": 0.5, "r": 4, "target_modules": ["first", "middle"]}
    model, x = adapted(directions="svd", triplets="gradient", **options), torch.randn(1, 7).double()
    gradients = weights_gradients(model, x)
    before = model(x)
    weights = {
        n: layer._weight() + layer.learned("default").dense() for n, layer in rosa_layers(model)
    }
    resample(model, batches=[x], loss=loss_of)
    torch.testing.assert_close(model(x), before)
    for name, layer in rosa_layers(model):
        gradient, vectors = gradients[name], spectrum(weights[name])
        energy = torch.zeros(min(gradient.shape)).double()
        if side != "right":
            energy += (vectors["left"].T @ gradient).square().sum(1)
        if side != "left":
            energy += (gradient @ vectors["right"]).square().sum(0)
        b = torch.linalg.qr(layer.rosa_B["default"].detach()).Q
        taken = (vectors["left"].T @ b).square().sum(1)
        torch.testing.assert_close(taken.round(), taken)  # whole triplets: each all in, or all out
        assert taken.sum().round() == 4
        assert set(energy.topk(2).indices.tolist()) <= set(taken.topk(4).indices.tolist()), name


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


def test_informed_triplets_are_random_until_a_gradient_was_seen():
    model = adapted(directions="svd", triplets="gradient")
    with pytest.warns(UserWarning, match="no gradient was seen of 3 of 3 weights"):
        resample(model)
    assert all(layer.rosa_offset["default"].draws == 2 for _, layer in rosa_layers(model))
    assert watch(model) == 3
    assert watch(adapted(directions="svd", triplets="gradient", informed=0.0)) == 0


def test_the_same_seed_draws_the_same():
    base, x, draws = Mlp().double(), torch.randn(5, 7).double(), []
    for seed in (1, 1, 2):
        options = {"temperature": 1.0, "informed": 0.5, "target_modules": NAMES}
        config = RosaConfig(r=2, directions="gradient", seed=seed, **options)
        model = get_peft_model(copy.deepcopy(base), config)
        resample(model, batches=[x], loss=loss_of)
        draws.append([layer.rosa_A["default"].detach().clone() for _, layer in rosa_layers(model)])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))


def test_part_of_the_subspace_stays_random():
    """With half of it informed, two draws from one gradient share that half and no more."""
    # In the three outputs of `last`, two random halves would come near each other too often.
    model = adapted(informed=0.5, target_modules=["first", "middle"])
    x = torch.randn(1, 7).double()
    spans = []
    for _ in range(2):
        resample(model, batches=[x], loss=loss_of)
        spans.append(
            [torch.linalg.qr(layer.rosa_B["default"].detach()).Q for _, layer in rosa_layers(model)]
        )
    for one, other in zip(*spans, strict=True):
        shared = torch.linalg.svdvals(one.T @ other)
        assert shared[0] > 1 - 1e-6
        assert shared[1] < 1 - 1e-4


def trained(model, x):
    """An optimizer of the factors that has made a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of(model, x).backward()
    optimizer.step()
    return optimizer


def test_a_subspace_that_is_not_spent_stays_with_all_of_its_state():
    """The gradient of one row lies in one direction: right after the draw all of it is held."""
    model, x = adapted(), torch.randn(1, 7).double()
    resample(model, batches=[x], loss=loss_of)
    optimizer = trained(model, x)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert resample(model, optimizer, batches=[x], loss=loss_of, spent=0.9) == 0
    now = model.state_dict(), optimizer.state_dict()
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert all(layer.watched("default") is None for _, layer in rosa_layers(model))
    assert resample(model, optimizer, batches=[x], loss=loss_of) == 3  # without a bound all go
    assert not optimizer.state


def test_only_the_spent_subspaces_are_drawn():
    model, x = adapted(), torch.randn(1, 7).double()
    watch(model)
    layers = [layer for _, layer in rosa_layers(model)]
    for number, layer in enumerate(layers):
        b = layer.rosa_B["default"].detach()
        inside = torch.linalg.qr(torch.cat([b, torch.randn(len(b), 1).double()], dim=1)).Q
        # As if the gradient lay in the subspace, but in the second layer beside it.
        total = layer.watched("default").sums["left"].zero_()
        total[0] = inside.T[-1] if number == 1 else inside.T[0]
    kept = [layer.rosa_A["default"].detach().clone() for layer in layers]
    before = model(x)
    assert resample(model, spent=0.99) == 1
    moved = [
        not torch.equal(k, layer.rosa_A["default"]) for k, layer in zip(kept, layers, strict=True)
    ]
    assert moved == [False, True, False]
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    ("directions", "spent", "message"),
    [
        ("gradient", 0.0, "spent is a share above 0, up to 1, or None; got 0"),
        ("gradient", 50, "spent is a share above 0, up to 1, or None; got 50"),
        ("svd", 0.5, "none of the active adapters looks at it: use directions='gradient'"),
    ],
)
def test_a_bound_of_no_use_is_refused(directions, spent, message):
    model = adapted(directions=directions)
    with pytest.raises(ValueError, match=message):
        resample(model, spent=spent)
    assert all(layer.rosa_offset["default"].draws == 1 for _, layer in rosa_layers(model))


def test_a_column_lasts_if_it_holds_what_a_fresh_direction_would():
    u, gradient = low_rank_gradient(30, 20, [4.0, 3.0, 2.0, 1.0])
    sketch = sketch_of(gradient, 4)
    sketch.sums["left"] = gradient.T  # without the noise of the projection
    beside = torch.linalg.qr(torch.cat([u, torch.randn(30, 2).double()], dim=1)).Q[:, 4:]

    def lasting(*columns, share=0.9):
        sizes = torch.rand(len(columns)).double() + 0.5  # which do not matter
        return sketch.lasting("left", torch.stack(columns, dim=1) * sizes, share).tolist()

    assert lasting(u[:, 2], u[:, 0], u[:, 1]) == [True, True, True]
    # The third direction of G holds what a third one would, but not what the second would.
    assert lasting(u[:, 2], beside[:, 0], u[:, 0]) == [True, False, True]
    assert lasting(u[:, 3], u[:, 0]) == [False, True]
    assert lasting(u[:, 3], u[:, 0], share=0.1) == [True, True]
    # What two columns hold together is counted once.
    assert lasting(u[:, 0], u[:, 0] + 0.01 * beside[:, 0]) == [True, False]
    assert lasting(beside[:, 0], beside[:, 1]) == [False, False]
    # G has four directions; of a fifth nothing is asked.
    assert lasting(*u.T, beside[:, 0]) == [True] * 5


@pytest.mark.parametrize("moments", ["clear", "keep", "project"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "right"},
        {"side": "both"},
        {"informed": 0.5, "alpha": 3.0},
        {"directions": "svd", "triplets": "gradient"},
        {"directions": "svd", "triplets": "gradient", "side": "both"},
    ],
    ids=str,
)
def test_terms_that_are_not_spent_stay_with_their_part_of_the_optimizers_state(
    options, moments, monkeypatch
):
    """Where some terms stay, all that is of them is untouched, and the model computes the same."""
    model, x = adapted(r=3, **options), torch.randn(4, 7).double()
    optimizer = trained(model, x)
    layers = [layer for _, layer in rosa_layers(model)]
    lasts = torch.tensor([True, False, True])
    monkeypatch.setattr(import_module("rosa.resample"), "lasting", lambda *_: lasts)
    (olds, state), output = copy.deepcopy((layers, optimizer.state)), model(x)
    assert resample(model, optimizer, batches=[x], loss=loss_of, moments=moments, spent=0.5) == 3
    torch.testing.assert_close(model(x), output)
    for old, new in zip(olds, layers, strict=True):
        rank = old.rosa_offset["default"].terms.rank
        assert new.rosa_offset["default"].terms.rank == rank + 2
        drawn = new.drawn("default")
        torch.testing.assert_close(drawn[lasts].A, old.drawn("default")[lasts].A, rtol=0, atol=0)
        torch.testing.assert_close(drawn[~lasts].A, new.learned("default")[~lasts].A)
        torch.testing.assert_close(drawn[~lasts].B, new.learned("default")[~lasts].B)
        for factors, at in (("rosa_A", (lasts,)), ("rosa_B", (slice(None), lasts))):
            a, b = getattr(old, factors)["default"], getattr(new, factors)["default"]
            assert torch.equal(a[at], b[at])
            assert not torch.equal(a, b)
            assert optimizer.state[b]["step"] == 1
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(optimizer.state[b][name][at], state[a][name][at])


def test_drawn_are_the_strongest_directions_beside_those_that_stay():
    u, gradient = low_rank_gradient(10, 7, [4.0, 3.0, 2.0, 1.0])
    model = adapted(r=2, target_modules=["first"])
    ((_, layer),) = rosa_layers(model)
    with torch.no_grad():
        layer.rosa_B["default"][:, 1] = u[:, 0] + 0.1 * u[:, 3]  # the second term holds the first
        layer.rosa_B["default"][:, 0] = u[:, 3]
    x = torch.randn(4, 7).double()
    before = model(x)
    watch(model)
    layer.watched("default").sums["left"] = gradient.T.clone()
    assert resample(model, spent=0.5) == 1
    torch.testing.assert_close(model(x), before)
    fresh = layer.rosa_B["default"].detach()[:, 0]
    # In what the second term leaves of G, the second direction is the strongest as before.
    torch.testing.assert_close((fresh @ u[:, 1]).abs(), fresh.norm())


def test_offsets_stay_small_and_exact_over_many_partial_draws():
    model, x = adapted(r=2), torch.randn(4, 7).double()
    optimizer = trained(model, x)
    drawn = 0
    for _ in range(40):
        batch = torch.randn(2, 7).double()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = model(x)
        drawn += resample(model, optimizer, batches=[batch], loss=loss_of, spent=0.3)
        torch.testing.assert_close(model(x), before)
    assert drawn > 0
    for _, layer in rosa_layers(model):
        terms = layer.rosa_offset["default"].terms
        assert terms.rank <= 1.5 * min(layer.in_features, layer.out_features) + 4
    base = copy.deepcopy(model).unload()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), before)
    assert not torch.allclose(base(x), before)


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
    good = [layer.watched("default").sums["left"].clone() for _, layer in rosa_layers(model)]
    (loss_of(model, x) * float("inf")).backward()
    for (_, layer), expected in zip(rosa_layers(model), good, strict=True):
        torch.testing.assert_close(layer.watched("default").sums["left"], expected)


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([torch.ones(2, 7).double()], None, "a batch is a Tensor"),
        ([torch.ones(2, 7).double()], lambda m, x: None, "gave no loss"),
        ([torch.ones(2, 7).double()], lambda m, x: loss_of(m, x).detach(), "gave no loss"),
    ],
)
def test_batches_of_no_use_are_refused_and_nothing_changes(batches, loss, message):
    model = adapted()
    before = [layer.rosa_offset["default"].draws for _, layer in rosa_layers(model)]
    with pytest.raises(ValueError, match=message):
        resample(model, batches=batches, loss=loss)
    assert [layer.rosa_offset["default"].draws for _, layer in rosa_layers(model)] == before
    assert all(layer.watched("default") is None for _, layer in rosa_layers(model))


def test_other_directions_are_not_watched():
    model = adapted(directions="orthonormal")
    assert watch(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resample(model, batches=[torch.randn(2, 7).double()], loss=loss_of)
