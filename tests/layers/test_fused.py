from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rosa import RosaConfig
from rosa.layers import fused
from rosa.layers.fused import adapted_linear, can_fuse
from rosa.layers.in_model import rosa_layers

SHAPES = [(4, 6), (2, 3, 6), (2, 3, 2, 6), (0, 6)]


def linear(kind="linear", bias=True):
    layer = nn.Linear(6, 5, bias=bias) if kind == "linear" else Conv1D(5, 6)
    return layer.double().requires_grad_(False)


def factors(rank=2, dtype=torch.float64):
    return (
        torch.randn(rank, 6, dtype=dtype).requires_grad_(),
        torch.randn(5, rank, dtype=dtype).requires_grad_(),
    )


def plain(base, x, a, b, scaling):
    return base(x) + scaling * (x @ a.T) @ b.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv", True)])
def test_outputs_and_gradients_are_those_of_the_plain_formula(shape, kind, bias):
    base, (a, b) = linear(kind, bias), factors()
    x = torch.randn(shape).double().requires_grad_()
    assert can_fuse(base, x, a)
    found, expected = adapted_linear(base, x, a, b, 0.7), plain(base, x, a, b, 0.7)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((found * weights).sum(), (x, a, b))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, a, b))
    torch.testing.assert_close(gradients, wanted)


def test_inputs_that_are_not_contiguous():
    base, (a, b) = linear(), factors()
    x = torch.randn(3, 6, 4).double().transpose(1, 2).requires_grad_()
    found, expected = adapted_linear(base, x, a, b, 1.0), plain(base, x, a, b, 1.0)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(3, 5, 4).double().transpose(1, 2)  # a gradient of its kind too
    gradients = torch.autograd.grad((found * weights).sum(), (x, a, b))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, a, b))
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_first_and_second_derivatives(scaling):
    base, (a, b) = linear(), factors()
    base.requires_grad_()
    x = torch.randn(3, 6).double().requires_grad_()

    def compute(x, a, b, weight, bias):
        return fused._AdaptedLinear.apply(x, weight, bias, a, b, scaling, None)

    inputs = (x, a, b, base.weight, base.bias)
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


AUTOCAST = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


def compare_under_autocast(half, base, x, a, b, wrap=lambda compute, x: compute(x)):
    """The fused form's output and gradients under autocast, against the plain formula's there."""
    leaves = [t for t in (x, a, b, base.weight, base.bias) if t is not None and t.requires_grad]
    weights = torch.randn(*x.shape[:-1], 5)

    def run(compute):
        with torch.autocast("cpu", dtype=half):
            out = wrap(compute, x)
        loss = (out * weights).sum()
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return out, [leaf.grad for leaf in leaves]

    found, gradients = run(lambda x: adapted_linear(base, x, a, b, 0.7))
    expected, wanted = run(lambda x: plain(base, x, a, b, 0.7))
    assert found.dtype == expected.dtype == half
    error = 16 * torch.finfo(half).eps
    for one, other in ((found, expected), *zip(gradients, wanted, strict=True)):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= error * other.norm()
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]


@AUTOCAST
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 3, 2, 6)])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv", True)])
def test_autocast_computes_what_the_plain_formula_computes_there(half, shape, kind, bias):
    base, (a, b) = linear(kind, bias).float(), factors(dtype=torch.float32)
    for x in (torch.randn(shape), torch.randn(shape, dtype=half)):  # as layers before give it
        compare_under_autocast(half, base, x.requires_grad_(), a, b)
    compare_under_autocast(half, base.requires_grad_(), torch.randn(shape), a, b)
    compare_under_autocast(half, base.to(half), torch.randn(shape), a, b)


@AUTOCAST
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_under_autocast(half, reentrant):
    base, (a, b) = linear().float(), factors(dtype=torch.float32)
    x = torch.randn(3, 6).requires_grad_()

    def wrap(compute, x):
        return checkpoint(compute, x, use_reentrant=reentrant)

    compare_under_autocast(half, base, x, a, b, wrap)


def test_second_derivatives_under_autocast():
    base, (a, b) = linear().float(), factors(dtype=torch.float32)
    x = torch.randn(3, 6).requires_grad_()

    def penalty_gradients(compute):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compute().float().square().sum()
        first = torch.autograd.grad(loss, (x, a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, a, b))

    found = penalty_gradients(lambda: adapted_linear(base, x, a, b, 1.0))
    wanted = penalty_gradients(lambda: plain(base, x, a, b, 1.0))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 0.2 * other.norm()


def test_autocast_takes_the_fused_form(monkeypatch):
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fuses(adapted()[0], x, monkeypatch)
        assert fuses(half_base(), x, monkeypatch)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    base, (a, b) = linear(), factors()
    x = torch.randn(3, 6).double().requires_grad_()

    def block(x):
        return adapted_linear(base, torch.tanh(x), a, b, 1.0).square()

    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    gradients = [t.grad.clone() for t in (x, a, b)]
    for t in (x, a, b):
        t.grad = None
    block(x).sum().backward()
    torch.testing.assert_close(gradients, [t.grad for t in (x, a, b)])


def test_what_is_saved_for_the_backward_pass_is_what_lora_saves():
    """The input, and r numbers a row; beside the parameters, which are there anyway."""
    base, (a, b) = linear(), factors()
    x = torch.randn(7, 6).double().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(base, x, a, b, 1.0)
    known = {t.untyped_storage().data_ptr() for t in (x, a, b, base.weight, base.bias)}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert [tuple(t.shape) for t in extra] == [(2, 7)]


def adapted(**options):
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), RosaConfig(r=2, target_modules=["0"], **options)
    )
    return model, next(rosa_layers(model))[1]


def half_base():
    """A bfloat16 base layer with float32 factors."""
    base = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    return get_peft_model(base, RosaConfig(r=2, target_modules=["0"]))


def fuses(model, x, monkeypatch):
    calls = []
    original = fused._AdaptedLinear.apply
    monkeypatch.setattr(
        fused._AdaptedLinear, "apply", lambda *args: calls.append(1) or original(*args)
    )
    model(x)
    return bool(calls)


def test_a_layer_takes_the_fused_form(monkeypatch):
    model, _ = adapted()
    assert fuses(model, torch.randn(4, 6), monkeypatch)


def test_a_hook_of_the_base_layer_is_called(monkeypatch):
    model, layer = adapted()
    seen = []
    layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
    assert not fuses(model, torch.randn(4, 6), monkeypatch)
    assert seen


def test_a_base_layer_whose_forward_was_replaced_is_called(monkeypatch):
    model, layer = adapted()
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) * 0 + 1
    assert not fuses(model, torch.randn(4, 6), monkeypatch)


def test_dropout_other_precisions_and_several_adapters_take_the_plain_form(monkeypatch):
    x = torch.randn(4, 6)
    assert not fuses(adapted(rosa_dropout=0.5)[0], x, monkeypatch)
    assert not fuses(half_base(), x.bfloat16(), monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Which autocast leaves as they are.
        assert not fuses(adapted()[0].double(), x.double(), monkeypatch)
    model, _ = adapted()
    model.add_adapter("other", RosaConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    assert not fuses(model, x, monkeypatch)


def test_vmap_and_grad_transforms():
    model, layer = adapted()
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    values = {name: p.detach() for name, p in layer.named_parameters() if "rosa_" in name}

    def loss(values):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    gradients = torch.func.grad(loss)(values)
    loss(dict(layer.named_parameters())).backward()
    for name, p in layer.named_parameters():
        if "rosa_" in name:
            torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.parametrize("trained", ["both", "A", "B"])
def test_a_model_without_values_tells_its_shapes(trained):
    """As tools do that count operations and bytes on the meta device."""
    with torch.device("meta"):
        model, _ = adapted(trained=trained)
        assert model(torch.empty(4, 6)).shape == (4, 5)
