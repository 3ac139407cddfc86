"""One factor trained, the other left as it was drawn: what learns, what is kept, what is stored."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from rosa import RosaCallback, RosaConfig, export_lora, resample, watch
from rosa.layers.fused import adapted_linear
from rosa.layers.in_model import rosa_layers
from rosa.resampling.decay import DecayTowardDrawn
from tests.helpers import adapters_of
from tests.models import Mlp, tiny_bert

NAMES = ["first", "middle", "last"]
X = torch.randn(9, 7).double()


def adapted(trained="B", **options):
    options = {"r": 2, "directions": "orthonormal", "target_modules": NAMES, **options}
    return get_peft_model(Mlp(), RosaConfig(trained=trained, **options))


def factors(model):
    """The factors that learn, and those that stay."""
    found = {
        "A": [layer.rosa_A["default"] for _, layer in rosa_layers(model)],
        "B": [layer.rosa_B["default"] for _, layer in rosa_layers(model)],
    }
    trained = model.peft_config["default"].trained
    return found[trained], found["B" if trained == "A" else "A"]


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("handed", ["all", "trained"])
@pytest.mark.parametrize("directions", ["svd", "orthonormal"])
@pytest.mark.parametrize("trained", ["A", "B"])
def test_the_other_factor_has_no_gradient_no_state_and_stays(trained, directions, handed):
    model = adapted(trained, directions=directions)
    learns, stays = factors(model)
    parameters = list(model.parameters()) if handed == "all" else learns
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3)
    decay = DecayTowardDrawn(optimizer, adapters_of(model, optimizer))
    for _ in range(3):
        before = [[f.detach().clone() for f in which] for which in (learns, stays)]
        train(model, optimizer)
        assert not any(map(torch.equal, learns, before[0]))
        assert all(map(torch.equal, stays, before[1]))
        assert not any(f.requires_grad or f.grad is not None for f in stays)
        assert {id(p) for p in optimizer.state} == set(map(id, learns))
        outputs = model(X)
        resample(model, optimizer)
        decay.refresh()
        torch.testing.assert_close(model(X), outputs)
        assert not any(map(torch.equal, stays, before[1]))  # drawn anew


@pytest.mark.parametrize("trained", ["A", "B"])
def test_the_other_factor_holds_directions_of_its_side(trained):
    """B those of the outputs, A those of the inputs, in the root mean square singular value."""
    model = adapted(trained)
    for _, layer in rosa_layers(model):
        weight, adapter = layer.pretrained_weight(), layer.adapters["default"]
        a, b = (factor.detach() for factor in adapter.factors)
        if trained == "A":
            torch.testing.assert_close(b.T @ b, torch.eye(2).double())
            torch.testing.assert_close(a, b.T @ weight)
        else:
            size = torch.linalg.svdvals(weight).pow(2).mean().sqrt()
            torch.testing.assert_close(a @ a.T / size**2, torch.eye(2).double(), rtol=0, atol=1e-5)
            torch.testing.assert_close(b, weight @ a.T / size**2, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("trained", ["A", "B"])
def test_it_stays_whatever_is_switched_on_and_off(trained):
    model = adapted(trained)
    model.add_adapter("second", RosaConfig(r=2, directions="svd", target_modules=NAMES))

    def learning():
        return sorted({n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad})

    model.set_adapter("second")
    assert learning() == ["rosa_A", "rosa_B"]
    model.set_adapter("default")
    assert learning() == [f"rosa_{trained}"]
    model.base_model.disable_adapter_layers()
    assert learning() == []
    model.base_model.enable_adapter_layers()
    assert learning() == [f"rosa_{trained}"]
    model.base_model.set_requires_grad("default", False)
    assert learning() == []
    model.base_model.set_requires_grad("default", True)
    assert learning() == [f"rosa_{trained}"]
    model.merge_adapter()
    model.unmerge_adapter()
    model.delete_adapter("second")
    assert learning() == [f"rosa_{trained}"]


@pytest.mark.parametrize("trained", ["A", "B"])
def test_a_round_is_stored_in_half_the_terms(trained, tmp_path):
    base = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)).double()
    options = {"r": 2, "directions": "orthonormal", "target_modules": ["0", "2"]}
    model = get_peft_model(copy.deepcopy(base), RosaConfig(trained=trained, **options))
    x = torch.randn(9, 40).double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for draws in range(1, 5):
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
        resample(model, optimizer)
        for adapter in adapters_of(model):
            assert adapter.terms.rank == 2 * draws + 2  # what was drawn is taken out
    expected = model(x)
    model.save_pretrained(tmp_path / "rosa")
    export_lora(model, tmp_path / "lora")
    for form in ("rosa", "lora"):
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / form))
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)
    again = PeftModel.from_pretrained(
        copy.deepcopy(base), str(tmp_path / "rosa"), is_trainable=True
    )
    assert {n.split(".")[-2] for n, p in again.named_parameters() if p.requires_grad} == {
        f"rosa_{trained}"
    }


def test_a_factor_that_was_cast_is_stored_as_it_is():
    model = adapted("B")
    model(X).square().mean().backward()
    for _, layer in rosa_layers(model):
        a = layer.rosa_A["default"]
        a.data = a.data.bfloat16().double()
        layer.rosa_B["default"].data.add_(1.0)
    outputs = model(X)
    resample(model)
    torch.testing.assert_close(model(X), outputs)
    weights = [layer.pretrained_weight() for _, layer in rosa_layers(model)]
    for (_, layer), weight in zip(rosa_layers(model), weights, strict=True):
        assert layer.adapters["default"].terms.rank == 6 or min(weight.shape) < 4


def kept(compute):
    """Shapes of what autograd keeps, but of parameters."""
    shapes = []

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        compute()
    return shapes


def run_plainly(model, x):
    model(x)


def run_with_a_hook(model, x):
    next(rosa_layers(model))[1].base_layer.register_forward_hook(lambda *_: None)
    model(x)


def run_under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        model(x)


@pytest.mark.parametrize("run", [run_plainly, run_with_a_hook, run_under_autocast])
@pytest.mark.parametrize("make", [lambda: nn.Linear(40, 30), lambda: Conv1D(30, 40)])
@pytest.mark.parametrize("trained", ["both", "A", "B"])
def test_where_b_alone_learns_the_inputs_are_not_kept(trained, make, run):
    config = RosaConfig(r=2, directions="orthonormal", trained=trained, target_modules=["0"])
    model = get_peft_model(nn.Sequential(make()), config)
    x = torch.randn(9, 40).requires_grad_()
    inputs = [shape for shape in kept(lambda: run(model, x)) if shape == (9, 40)]
    assert bool(inputs) == (trained != "B")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = adapted("B")
    learns, _ = factors(model)
    expected = torch.autograd.grad(model(X).square().sum(), learns)
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close([b.grad for b in learns], list(expected))


@pytest.mark.parametrize("trained", ["a", "b"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)])
def test_the_fused_gradients_are_those_of_the_plain_formula(make, trained):
    base = make().double().requires_grad_(False)
    x = torch.randn(2, 3, 6).double().requires_grad_()
    a, b = torch.randn(2, 6).double(), torch.randn(5, 2).double()
    learns = {"a": a, "b": b}[trained].requires_grad_()
    found = adapted_linear(base, x, a, b, 0.7)
    expected = base(x) + 0.7 * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((found * weights).sum(), (x, learns))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, learns))
    torch.testing.assert_close(gradients, wanted)


def test_second_derivatives_are_right_or_refused_where_they_need_inputs_that_are_not_kept():
    base = nn.Linear(6, 5).double().requires_grad_(False)
    x, a, b = torch.randn(3, 6).double(), torch.randn(2, 6).double(), torch.randn(5, 2).double()
    learned_x, learned_a, learned_b = (t.clone().requires_grad_() for t in (x, a, b))
    for inputs in ((learned_x, learned_a, b), (x, learned_a, b), (x, a, learned_b)):
        assert torch.autograd.gradgradcheck(
            lambda x, a, b: adapted_linear(base, x, a, b, 0.7).square(), inputs
        )
    loss = adapted_linear(base, learned_x, a, learned_b, 0.7).square().sum()
    with pytest.raises(ValueError, match="second derivatives need the inputs"):
        torch.autograd.grad(loss, learned_b, create_graph=True)


def test_where_b_alone_learns_draws_are_random_and_nothing_is_watched():
    """What it would take to see the gradient's directions of the inputs is to keep the inputs."""
    factors = []
    for directions in ("gradient", "orthonormal"):
        torch.manual_seed(1)
        model = adapted("B", directions=directions)
        assert watch(model) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resample(model)
        factors.append([f for _, layer in rosa_layers(model) for f in layer.parameters()])
    torch.testing.assert_close(factors[0], factors[1])


def test_what_cannot_learn_is_refused():
    with pytest.raises(ValueError, match="trained must be one of both, A, B; got 'C'"):
        RosaConfig(trained="C")
    with pytest.raises(ValueError, match="keeps A from learning"):
        RosaConfig(trained="A", directions="zero")
    model = adapted("B", directions="zero")
    train(model, torch.optim.AdamW(factors(model)[0], lr=0.1))
    assert all(b.any() for b in factors(model)[0])


def test_a_rate_for_factors_that_do_not_learn_is_refused():
    model = adapted("B")
    learn, fixed = factors(model)
    resample(model, torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.1))
    resample(model, torch.optim.AdamW([{"params": learn}, {"params": fixed}], lr=0.1))
    resample(model, torch.optim.SGD([{"params": learn, "lr": 1.0}, {"params": learn[:0]}], lr=0.1))
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = cls([{"params": learn}, {"params": fixed, "lr": 0.01}], lr=0.1)
        with pytest.raises(ValueError, match=r"rate of its own, 0\.01, for 3 factors that do not"):
            resample(model, optimizer)


def trainer(folder, trained, **options):
    rows = Dataset.from_dict(
        {"input_ids": torch.randint(50, (16, 6)).tolist(), "labels": [i % 2 for i in range(16)]}
    )
    config = RosaConfig(
        r=2, directions="orthonormal", trained=trained, target_modules=["query", "value"]
    )
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    callback = RosaCallback(3)
    model = get_peft_model(tiny_bert(), config)
    return Trainer(model, args, train_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize("trained", ["A", "B"])
def test_a_trainer_trains_decays_and_resumes_it(trained, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*got no gradient in the first step")
        whole = trainer(tmp_path, trained, weight_decay=0.1)
        whole.train()
        again = trainer(tmp_path, trained, weight_decay=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    assert again.state.global_step == whole.state.global_step


@pytest.mark.parametrize(("before", "now"), itertools.permutations(("A", "B", "both"), 2))
def test_a_checkpoint_that_trained_another_factor_is_refused(before, now, tmp_path):
    trainer(tmp_path, before).train()
    again = trainer(tmp_path, now)
    folder = str(tmp_path / "checkpoint-2")
    held = {name: value.clone() for name, value in again.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"is of a training of factors '{before}', .* '{now}'"):
        again.train(resume_from_checkpoint=folder)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, held[name]), name
    config = RosaConfig.from_pretrained(folder)
    config.trained = now  # begun anew, with another factor
    other = PeftModel.from_pretrained(tiny_bert(), folder, config=config, is_trainable=True)
    factors = {n[-9] for n, p in other.named_parameters() if "rosa_" in n and p.requires_grad}
    assert factors == set("AB" if now == "both" else now)
