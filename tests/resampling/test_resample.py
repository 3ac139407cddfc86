from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.optimization import Adafactor as TheirAdafactor

from rosa import RosaConfig, resample, watch
from rosa.algebra import subspace
from rosa.algebra.lowrank import LowRank
from rosa.layers.in_model import rosa_layers
from tests.models import Mlp
from tests.reference import best_rank_r


def adapted(**options):
    config = RosaConfig(**{"r": 2, "target_modules": ["first", "middle", "last"], **options})
    return get_peft_model(Mlp(), config)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer, backward=None):
    loss = model(torch.randn(8, 7).double()).square().mean()
    loss.backward() if backward is None else backward(loss)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("directions", subspace.DIRECTIONS)
def test_outputs_and_parameter_objects_stay_and_the_subspace_changes(directions):
    model, x = adapted(directions=directions), torch.randn(6, 7).double()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    for _ in range(3):
        step(model, optimizer)
        before, factors = model(x), trained(model)
        values = [p.detach().clone() for p in factors]
        assert resample(model, optimizer) == 3
        torch.testing.assert_close(model(x), before)
        assert all(p is q for p, q in zip(trained(model), factors, strict=True))
        assert not any(torch.allclose(p, v) for p, v in zip(factors, values, strict=True))


def test_the_theorem_of_the_paper_on_a_linear_model():
    """T = ceil(rank(W* - W_0) / R) rounds, each solved to its optimum, reach the optimum."""
    true_rank, rank = 7, 3
    x = torch.randn(40, 9).double()
    layer = nn.Linear(9, 8, bias=False).double()
    change = torch.randn(8, true_rank).double() @ torch.randn(true_rank, 9).double()
    optimum = layer.weight.detach() + change
    y = x @ optimum.T
    model = get_peft_model(nn.Sequential(layer), RosaConfig(r=rank, target_modules=["0"]))
    (_, rosa), *_ = rosa_layers(model)
    losses = []
    for _ in range(-(-true_rank // rank)):
        # A suitable subspace: directions inside the column space of what is still to be learned.
        with torch.no_grad():
            weight = rosa.pretrained_weight() + rosa.whole_change("default").dense()
            left = torch.linalg.svd(optimum - weight)[0][:, :rank]
            a, b = left.T @ weight, left
            old = rosa.adapters["default"]
            old.terms = old.terms + rosa.adapters["default"].learned() + LowRank(-b, a)
            rosa.rosa_A["default"].copy_(a)
            rosa.rosa_B["default"].copy_(b)
            rosa.synchronize()
            torch.testing.assert_close(model(x), x @ weight.T)
            # The round's optimum over both factors.
            fixed = weight - b @ a
            a, b = best_rank_r(optimum - fixed, rank)
            rosa.rosa_A["default"].copy_(a)
            rosa.rosa_B["default"].copy_(b)
            losses.append(float((model(x) - y).square().mean()))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 1e-20


def test_random_subspaces_reach_what_lora_of_that_rank_cannot():
    """Rounds of blind draws, each trained, go below the best that one rank-R product can do."""
    x = torch.randn(60, 8).double()
    layer = nn.Linear(8, 8, bias=False).double()
    change = torch.randn(8, 8).double()
    y = x @ (layer.weight.detach() + change).T
    a, b = best_rank_r(change, 2)
    bound = float((x @ (change - b @ a).T).square().mean())
    config = RosaConfig(r=2, target_modules=["0"], directions="orthonormal")
    model = get_peft_model(nn.Sequential(layer), config)
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    for step_ in range(1500):
        if step_ and step_ % 50 == 0:
            resample(model, optimizer)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The best product in the data's own norm is below `bound`, but not by such a factor.
    assert loss.item() < 0.05 * bound


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_exactly_the_redrawn_factors_lose_their_optimizer_state(build):
    model = adapted(target_modules=["first"], modules_to_save=["last"])
    head = [p for n, p in model.named_parameters() if p.requires_grad and "rosa_" not in n]
    factors = [p for n, p in model.named_parameters() if p.requires_grad and "rosa_" in n]
    assert len(head) == 2
    assert len(factors) == 2
    optimizer = build([{"params": head}, {"params": factors, "lr": 0.05}])
    step(model, optimizer)
    kept = [optimizer.state[p] for p in head]
    resample(model, optimizer)
    assert all(optimizer.state[p] is state for p, state in zip(head, kept, strict=True))
    assert not any(p in optimizer.state for p in factors)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.05]
    step(model, optimizer)
    for p in factors:
        if "step" in optimizer.state[p]:
            assert float(optimizer.state[p]["step"]) == 1


def test_an_optimizer_wrapped_by_accelerate():
    accelerator = Accelerator(cpu=True)
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    step(model, optimizer, accelerator.backward)
    schedule.step()
    rate = schedule.get_last_lr()
    assert len(optimizer.state) == 6
    resample(model, optimizer)
    assert len(optimizer.state) == 0
    assert schedule.get_last_lr() == rate
    step(model, optimizer, accelerator.backward)


def test_stale_gradients_are_dropped():
    model = adapted()
    model(torch.randn(2, 7).double()).sum().backward()
    resample(model)
    assert all(p.grad is None for p in trained(model))


def test_only_the_active_adapter_is_drawn():
    model, x = adapted(), torch.randn(3, 7).double()
    model.add_adapter("second", RosaConfig(r=1, target_modules=["first"], seed=3))
    resample(model)
    (_, layer), *_ = rosa_layers(model)
    assert layer.adapters["default"].draws == 2
    assert layer.adapters["second"].draws == 1
    model.set_adapter("second")
    before = model(x)
    assert resample(model) == 1
    torch.testing.assert_close(model(x), before)


def test_an_adapter_made_for_inference_is_drawn_when_asked():
    model, x = adapted(inference_mode=True), torch.randn(3, 7).double()
    (_, layer), *_ = rosa_layers(model)
    assert layer.adapters["default"].draws == 0
    before = model(x)
    resample(model)
    assert layer.adapters["default"].draws == 1
    torch.testing.assert_close(model(x), before)


def test_a_model_without_rosa_is_refused():
    with pytest.raises(ValueError, match=r"has no ROSA layers: attach them"):
        resample(Mlp())
    with pytest.raises(TypeError, match="takes the model first and then the optimizer"):
        resample(torch.optim.SGD(Mlp().parameters(), lr=0.1), Mlp())
    lora = get_peft_model(Mlp(), LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match=r"has no ROSA layers"):
        resample(lora)


def test_a_merged_or_disabled_model_is_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged: call model.unmerge_adapter"):
        resample(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        resample(model)
    resample(model)


def test_an_optimizer_without_the_factors_is_refused_and_nothing_changes():
    model = adapted()
    values = [p.detach().clone() for p in trained(model)]
    optimizer = torch.optim.AdamW(trained(model)[:-1])
    with pytest.raises(ValueError, match="does not hold the factors of layer"):
        resample(model, optimizer)
    with pytest.raises(TypeError, match="must be a torch optimizer, got str"):
        resample(model, "adam")
    assert all(torch.equal(p, v) for p, v in zip(trained(model), values, strict=True))


def test_a_diverged_factor_is_refused_before_anything_is_drawn():
    model = adapted()
    layers = [layer for _, layer in rosa_layers(model)]
    layers[-1].rosa_A["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer .*last has NaN or infinity"):
        resample(model)
    assert all(layer.adapters["default"].draws == 1 for layer in layers)


@pytest.mark.parametrize("directions", ["svd", "orthonormal", "gradient"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_weight_that_broke_after_attaching_is_not_drawn_from(directions, broken):
    config = RosaConfig(r=2, target_modules=["last"], directions=directions)
    model = get_peft_model(Mlp().double(), config)
    (_, layer), *_ = rosa_layers(model)
    with torch.no_grad():
        layer.base_weight.parameter[0, 1] = broken
    before = [factor.detach().clone() for factor in layer.adapters["default"].factors]
    with pytest.raises(ValueError, match=r"NaN|changed while ROSA's offset stood in it"):
        resample(model)
    assert all(map(torch.equal, layer.adapters["default"].factors, before))


def test_factors_that_wait_for_a_file_are_refused():
    config = RosaConfig(r=2, target_modules=["first"])
    model = get_peft_model(Mlp(), config, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"first are on the meta device .*load the adapter's file"):
        resample(model)


@pytest.mark.parametrize("cast", [nn.Module.double, nn.Module.float, nn.Module.bfloat16])
def test_a_cast_between_looking_and_drawing(cast):
    model = get_peft_model(Mlp(torch.float32), RosaConfig(r=2, target_modules=["first", "last"]))
    x = torch.randn(5, 7)
    watch(model)
    model(x).square().sum().backward()
    cast(model)
    x = x.to(model.base_model.model.first.weight.dtype)
    before = model(x)
    resample(model)
    close = 32 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(model(x), before, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_that_is_trained_as_well_is_drawn(dtype):
    model = get_peft_model(
        Mlp(dtype), RosaConfig(r=2, directions="orthonormal", target_modules=["first", "last"])
    )
    layer = next(rosa_layers(model))[1]
    layer.base_layer.weight.requires_grad_()
    x = torch.randn(5, 7, dtype=dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = model(x)
        resample(model, optimizer)
        close = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(model(x), before, rtol=close, atol=close)


def test_layers_that_wait_for_their_first_input_are_no_hindrance():
    model = nn.Sequential(nn.LazyLinear(7), Mlp(torch.float32))
    adapted = get_peft_model(model, RosaConfig(r=2, target_modules=["first"]))
    assert adapted(torch.randn(3, 2, dtype=torch.float32)).shape == (3, 3)


def test_looking_at_batches_leaves_the_norms_statistics():
    model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    adapted = get_peft_model(model, RosaConfig(r=2, target_modules=["0", "2"])).train()
    x = torch.randn(8, 7).double()
    adapted(x)
    before = adapted.eval()(x)
    resample(adapted.train(), batches=[x], loss=lambda m, batch: m(batch).square().sum())
    torch.testing.assert_close(adapted.eval()(x), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_looking_that_ends_early_leaves_nothing_to_draw_from(error):
    model = get_peft_model(Mlp(), RosaConfig(r=2, target_modules=["first"]))

    def loss(model, batch):
        if batch is None:
            raise error
        return model(batch).square().sum()

    with pytest.raises(error):
        resample(model, batches=[torch.randn(4, 7).double(), None], loss=loss)
    assert all(a.sketch is None for _, layer in rosa_layers(model) for a in layer.adapters.values())


def test_an_optimizer_that_has_no_rate_given():
    model = get_peft_model(Mlp(), RosaConfig(r=2, target_modules=["first"], directions="svd"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = TheirAdafactor(trained, lr=None, relative_step=True, warmup_init=True)
    model(torch.randn(4, 7).double()).square().sum().backward()
    optimizer.step()
    assert resample(model, optimizer) == 1
    assert not optimizer.state
