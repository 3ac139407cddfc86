"""Optimizers and their wrappers over a resample: cleared, or refused before anything changes."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DummyOptim
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer, _apply_optimizer_in_backward
from torch.distributed.optim.named_optimizer import _NamedOptimizer
from torch.optim import SGD, AdamW
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from rosa import RosaCallback, RosaConfig, resample
from rosa.layers.in_model import rosa_layers
from rosa.resampling.decay import DecayTowardDrawn
from rosa.resampling.optimizers import states_of
from tests.helpers import adapters_of
from tests.models import Mlp

X = torch.randn(8, 7)


def adapted(r=2, **options):
    config = RosaConfig(
        r=r, directions="orthonormal", target_modules=["first", "middle", "last"], **options
    )
    return get_peft_model(Mlp(torch.float32), config)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer):
    model(X).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()


def entries(model, optimizer):
    factors = trained(model)
    return [s[p] for s in states_of(optimizer, factors) for p in factors if s.get(p)]


class Several:
    """Two optimizers that step together, as users write them."""

    def __init__(self, *parts):
        self.parts = parts

    def step(self):
        for part in self.parts:
            part.step()


class Quiet(torch.optim.Optimizer):
    """A wrapper with groups and a state of its own that stays empty, as ZeRO's is."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self._hidden = [inner]

    def step(self, closure=None):  # type: ignore[override]
        self._hidden[0].step(closure)


def layerwise(model, wrap=lambda o: o):
    each = {p: AdamW([p]) for p in trained(model)}
    for parameter in each:
        parameter.register_post_accumulate_grad_hook(lambda p: each[p].step())
    return wrap(LayerWiseDummyOptimizer(optimizer_dict=each))


def in_backward(model):
    _apply_optimizer_in_backward(AdamW, trained(model), {"lr": 1e-2})


def post_local(model):
    averager = type("Averager", (), {"average_parameters": lambda self, params: None})()
    return PostLocalSGDOptimizer(AdamW(trained(model)), averager)


def named(model):
    return _NamedOptimizer(dict(model.named_parameters()), AdamW, module=model)  # type: ignore[arg-type]


def halves(model):
    factors = trained(model)
    return AdamW(factors[:2]), SGD(factors[2:], 0.1, momentum=0.9)


def accelerated(model, of=lambda model: AdamW(trained(model))):
    return Accelerator(cpu=True).prepare_optimizer(of(model), device_placement=False)


def deepspeed(optimizer):
    Accelerator(cpu=True)
    wrapper = DeepSpeedOptimizerWrapper(optimizer)
    wrapper.step = optimizer.step  # what the engine does in its backward
    return wrapper


WRAPPED = {
    "accelerate": accelerated,
    "deepspeed without masters": lambda m: deepspeed(AdamW(trained(m))),
    "post-local SGD": post_local,
    "named": named,
    "state in an inner one": lambda m: Quiet(AdamW(trained(m))),
    "twice": lambda m: accelerated(m, lambda m: Quiet(Quiet(AdamW(trained(m))))),
    "layerwise": layerwise,
    "layerwise, accelerated": lambda m: accelerated(m, layerwise),
    "in the backward pass": in_backward,
    "several": lambda m: Several(*halves(m)),
    "accelerated several": lambda m: Several(
        *(accelerated(m, lambda _, o=o: o) for o in halves(m))
    ),
}


@pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("moments", ["clear", "keep"])
def test_the_state_inside_a_wrapper_is_cleared_or_kept(build, moments):
    model = adapted()
    optimizer = build(model)
    step(model, optimizer)
    before = [
        {k: torch.as_tensor(v).clone() for k, v in e.items()} for e in entries(model, optimizer)
    ]
    assert len(before) == len(trained(model))
    outputs = model(X)
    resample(model, optimizer, moments=moments)
    torch.testing.assert_close(model(X), outputs)
    after = entries(model, optimizer)
    if moments == "clear":
        assert not after
    else:
        same = [
            torch.equal(new[k], old[k])
            for new, old in zip(after, before, strict=True)
            for k in old
            if k != "step"
        ]
        assert all(same)
    step(model, optimizer)
    assert len(entries(model, optimizer)) == len(before)


@pytest.mark.parametrize("kind", [list, tuple, lambda both: dict(enumerate(both))])
def test_several_optimizers_may_be_given_as_they_are(kind):
    model = adapted()
    both = halves(model)
    step(model, Several(*both))
    resample(model, kind(both))
    assert not entries(model, list(both))


def test_what_lbfgs_knows_of_all_parameters_at_once_goes():
    torch.manual_seed(0)  # of a few random inputs it learns nothing, and then has nothing to lose
    model, x = adapted(modules_to_save=None), torch.randn_like(X)
    bias = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.LBFGS([bias, *trained(model)], max_iter=3)

    def closure():
        model.zero_grad()
        loss = (model(x) + bias).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[bias]["old_dirs"]
    resample(model, optimizer)
    assert not optimizer.state
    optimizer.step(closure)


# -- refused --------------------------------------------------------------------------------------


class Masters:
    """fp32 copies that are stepped and written back, as DeepSpeed, Apex and Megatron have them."""

    def __init__(self, factors, flat=False, own_groups=False):
        self.bit16_groups = [factors]
        copies = [p.detach().float().clone().requires_grad_() for p in factors]
        if flat:
            copies = [torch.cat([p.detach().flatten() for p in copies]).requires_grad_()]
        if not (flat and own_groups):  # else they are in the optimizer inside alone
            self.fp32_groups = [copies]
        self.optimizer = AdamW(copies)
        if own_groups:
            self.groups = [{"params": factors, "lr": 1e-3}]

    param_groups = property(lambda self: self.__dict__.get("groups", self.optimizer.param_groups))
    state = property(lambda self: self.optimizer.state)

    def step(self): ...


class Lookahead(torch.optim.Optimizer):
    """Keeps slow weights beside the optimizer that it wraps."""

    def __init__(self, inner):
        self.optimizer = inner
        self.slow_weights = [[p.detach().clone() for p in g["params"]] for g in inner.param_groups]

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]


class ApexLike(AdamW):
    """Master weights beside the groups, under a name of their own."""

    def __init__(self, factors):
        super().__init__(factors)
        self.param_groups_master = [{"params": [p.detach().clone() for p in factors]}]


class ByName(torch.optim.Optimizer):
    """Moments under the parameters' names, in an attribute or in its state."""

    def __init__(self, model, in_state):
        super().__init__(trained(model), {"lr": 1e-3})
        rows = {n: {"m": torch.zeros(len(p))} for n, p in model.named_parameters() if "rosa" in n}
        self.state.update(rows) if in_state else setattr(self, "rows", rows)


class Offloading(torch.optim.Optimizer):
    """A host's copy of each parameter and an optimizer for each, as torchao's has."""

    def __init__(self, factors):
        self.copies = {p: p.detach().clone() for p in factors}
        self.optim_dict = {p: AdamW([copy]) for p, copy in self.copies.items()}

    @property
    def param_groups(self):  # type: ignore[override]
        return [g for o in self.optim_dict.values() for g in o.param_groups]


HOLDS_NOT = "does not hold the factors of layer"
REFUSED = {
    "masters": (lambda m: Masters(trained(m)), HOLDS_NOT),
    "flat masters": (lambda m: Masters(trained(m), flat=True), HOLDS_NOT),
    "masters behind the model's groups": (
        lambda m: Masters(trained(m), own_groups=True),
        "copies|own",
    ),
    "flat masters behind the model's groups": (
        lambda m: Masters(trained(m), flat=True, own_groups=True),
        "tensors of its own for the factors .in AdamW",
    ),
    "deepspeed with accelerate": (
        lambda m: deepspeed(Masters(trained(m), flat=True)),
        HOLDS_NOT,
    ),
    "apex": (lambda m: ApexLike(trained(m)), "param_groups_master"),
    "lookahead": (lambda m: Lookahead(AdamW(trained(m))), "Lookahead keeps .* slow_weights"),
    "accelerated lookahead": (
        lambda m: accelerated(m, lambda m: Lookahead(AdamW(trained(m)))),
        "slow_weights",
    ),
    "offloading": (lambda m: Offloading(trained(m)), HOLDS_NOT),
    "by name": (lambda m: ByName(m, in_state=False), "in rows"),
    "by name in the state": (lambda m: ByName(m, in_state=True), "in state"),
    "dummy": (lambda m: DummyOptim(trained(m)), "must be a torch optimizer, got DummyOptim"),
    "remote": (
        lambda m: type("DistributedOptimizer", (), {"remote_optimizers": [object()]})(),
        "must be a torch optimizer, got DistributedOptimizer",
    ),
    "one of several is another model's": (
        lambda m: [AdamW(nn.Linear(2, 2).parameters()), AdamW(trained(m)[1:])],
        HOLDS_NOT,
    ),
    "LoRA+": (
        lambda m: create_loraplus_optimizer(m, AdamW, lr=1e-3, loraplus_lr_ratio=16),
        "LoRA.'s optimizer .* are in its slow group",
    ),
    "LoRA+ with Accelerate": (
        lambda m: accelerated(
            m,
            lambda m: create_loraplus_optimizer(
                m, AdamW, lr=1e-3, loraplus_lr_ratio=4, loraplus_weight_decay=0.1
            ),
        ),
        "slow group",
    ),
    "LoRA-FA": (
        lambda m: create_lorafa_optimizer(m, r=2, lora_alpha=2, lr=1e-3),
        "LoRA-FA's optimizer finds LoRA's factors by their names",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_keeps_copies_or_cannot_be_understood_is_refused_at_the_start(
    build, message, tmp_path
):
    model = adapted()
    values = [p.detach().clone() for p in trained(model)]
    optimizer = build(model)
    with pytest.raises(ValueError, match=message):
        resample(model, optimizer)
    with pytest.raises(ValueError, match=message):
        begin(RosaCallback(), model, optimizer, tmp_path)
    assert all(layer.adapters["default"].draws == 1 for _, layer in rosa_layers(model))
    assert all(torch.equal(p, v) for p, v in zip(trained(model), values, strict=True))


def begin(callback, model, optimizer, folder):
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
    state = TrainerState(max_steps=100)
    callback.on_train_begin(arguments, state, TrainerControl(), model=model, optimizer=optimizer)
    return arguments, state


def test_groups_with_rates_of_their_own_and_loraplus_without_a_ratio_are_not_refused():
    model = adapted()
    a = [p for n, p in model.named_parameters() if "rosa_A" in n]
    b = [p for n, p in model.named_parameters() if "rosa_B" in n]
    resample(model, AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 1e-2}]))
    resample(model, create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=1))
    rates = [{"params": [p], "lr": 10.0**-i, "weight_decay": i % 2} for i, p in enumerate(a + b)]
    resample(model, AdamW(rates))


def test_values_of_the_factor_in_the_state_are_not_kept():
    model = adapted()
    optimizer = torch.optim.ASGD(trained(model))
    step(model, optimizer)
    with pytest.raises(ValueError, match="holds ax, a value of the factor itself"):
        resample(model, optimizer, moments="keep")


def test_slow_weights_in_the_state_follow_what_is_drawn():
    model = adapted()
    optimizer = AdamW(trained(model))
    optimizer.slow = SGD(trained(model), 0.1)  # type: ignore[attr-defined]
    for factor in trained(model):
        optimizer.slow.state[factor] = {"slow_params": factor.detach().clone()}
    resample(model, optimizer)
    for factor in trained(model):
        assert torch.equal(optimizer.slow.state[factor]["slow_params"], factor)


# -- what the callback does besides ---------------------------------------------------------------


@pytest.mark.parametrize("wrap", [accelerated, lambda m, of: Quiet(of(m))])
def test_decay_toward_what_was_drawn_reaches_the_optimizer_inside(wrap):
    model = adapted()
    optimizer = wrap(model, lambda m: AdamW(trained(m), lr=0.1, weight_decay=0.5))
    decay = DecayTowardDrawn(optimizer, adapters_of(model, optimizer))
    values = [p.detach().clone() for p in trained(model)]
    for factor in trained(model):
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    for factor, value in zip(trained(model), values, strict=True):
        torch.testing.assert_close(factor.detach(), value)
    decay.stop()
    optimizer.step()
    assert not any(torch.equal(p, v) for p, v in zip(trained(model), values, strict=True))


# -- other libraries' -----------------------------------------------------------------------------


def regression(seed):
    torch.manual_seed(seed)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 12)),
        RosaConfig(r=2, directions="orthonormal", target_modules=["0"], seed=seed),
    )
    x = torch.randn(200, 12)
    y = x @ torch.randn(12, 12)
    return model, lambda: (model(x) - y).square().mean()


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_schedule_free_average_goes_on_from_what_is_drawn(kind, mode):
    """In either mode the model stays as it is, and the average goes on from there, downhill."""
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model, loss = regression(0)
    build = functools.partial(getattr(schedulefree, kind), lr=0.05 if kind[0] != "S" else 0.2)
    optimizer = build(trained(model))
    averaged = []
    for _ in range(4):
        optimizer.train()
        for _ in range(60):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        optimizer.eval()
        averaged.append(loss().item())
        if mode == "train":
            optimizer.train()
        before = loss().item()
        resample(model, optimizer)
        assert loss().item() == pytest.approx(before, rel=1e-4)
        assert not entries(model, optimizer)
        optimizer.train()
        assert loss().item() == pytest.approx(before, rel=1e-4)  # y is x: no old z moves it
        optimizer.eval()
        assert loss().item() == pytest.approx(before, rel=1e-4)
    assert all(later < earlier for earlier, later in itertools.pairwise(averaged))
    with pytest.raises(ValueError, match="a schedule-free optimizer holds points"):
        resample(model, build(trained(model)), moments="keep")


def test_the_schedule_free_wrapper():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model, loss = regression(1)
    optimizer = schedulefree.ScheduleFreeWrapper(SGD(trained(model), lr=0.2), momentum=0.9)
    optimizer.train()
    start = loss().item()
    for number in range(200):
        if number % 50 == 49:
            resample(
                model, accelerated(model, lambda _: optimizer.base) if number < 60 else optimizer
            )
            assert not entries(model, optimizer)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.eval()
    assert loss().item() < 0.9 * start
    with pytest.raises(ValueError, match="a schedule-free optimizer holds points"):
        resample(model, optimizer, moments="keep")


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdEMAMix8bit"])
def test_bitsandbytes(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = RosaConfig(r=16, directions="orthonormal", target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(512, 256)), config)
    optimizer = getattr(bitsandbytes.optim, kind)(trained(model))
    x = torch.randn(8, 512)

    def go():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    go()
    assert any(
        v.dtype == torch.uint8
        for e in entries(model, optimizer)
        for v in e.values()
        if torch.is_tensor(v)
    )
    resample(model, optimizer)
    assert not entries(model, optimizer)
    go()
    assert len(entries(model, optimizer)) == 2


def test_torchao():
    torchao = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    config = RosaConfig(r=16, directions="orthonormal", target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(512, 256)), config)
    optimizer = torchao.AdamW8bit(trained(model))
    a, b = trained(model)
    for factor in (a, b):  # as its step would, without compiling it
        optimizer.state[factor] = {
            "step": torch.tensor(1.0),
            "exp_avg": optimizer._new_buffer(factor, True),
            "exp_avg_sq": optimizer._new_buffer(factor, False),
        }
    assert type(optimizer.state[a]["exp_avg"]) is not torch.Tensor
    resample(model, optimizer)
    assert not optimizer.state
