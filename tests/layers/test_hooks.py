"""What hooks on a layer do, they do to all that the adapted layer computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rosa import RosaConfig, resample, watch
from rosa.layers.in_model import rosa_layers

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "transposed": lambda: Conv1D(5, 6),
    "embedding": lambda: nn.Embedding(9, 5),
    "conv": lambda: nn.Conv1d(6, 5, 3, groups=1),
}


def halve_the_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x,) = args
    return (x * 0.5,) if x.is_floating_point() else (x // 2,)


def clamp_the_outputs(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.clamp(-0.1, 0.2)


HOOKS = {
    "pre": lambda m: m.register_forward_pre_hook(halve_the_inputs),
    "post": lambda m: m.register_forward_hook(clamp_the_outputs),
    "both": lambda m: (
        m.register_forward_pre_hook(halve_the_inputs),
        m.register_forward_hook(clamp_the_outputs),
    ),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("late", [False, True])
def test_an_adapted_layer_with_hooks_is_the_merged_layer_with_them(kind, hook, late):
    layer = LAYERS[kind]().double()
    x: Tensor = torch.randint(9, (4, 3)) if kind == "embedding" else torch.randn(4, 6, 6).double()
    if not late:
        HOOKS[hook](layer)
    before = layer(x)
    model: Any = get_peft_model(nn.Sequential(layer), RosaConfig(r=2, target_modules=["0"]))
    model.double()
    if late:
        HOOKS[hook](layer)
        before = copy.deepcopy(model).unload()[0](x)
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    merged = copy.deepcopy(model).merge_and_unload()[0]
    torch.testing.assert_close(model(x), merged(x))
    assert layer.__dict__.get("forward") is None
    watch(model)
    model(x).square().sum().backward()
    ((_, adapted),) = rosa_layers(model)
    sketch = adapted.adapters["default"].sketch
    assert sketch is not None
    weight = merged.weight
    weight.requires_grad_()
    merged(x).square().sum().backward()
    gradient = adapted.base_weight.view.as_matrix(weight.grad)
    torch.testing.assert_close(sketch.total, (gradient @ sketch.test).T)
    resample(model)
    torch.testing.assert_close(model(x), copy.deepcopy(model).merge_and_unload()[0](x))


def test_a_forward_of_the_instance_is_refused_or_given_the_changed_weight():
    linear, conv = nn.Linear(6, 5), nn.Conv1d(6, 5, 3)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight * 0.1)  # type: ignore
    with pytest.raises(ValueError, match="computes something else"):
        get_peft_model(nn.Sequential(linear), RosaConfig(r=2, target_modules=["0"]))
    conv.forward = lambda x: nn.functional.conv1d(x, conv.weight * 0.1)  # type: ignore
    x = torch.randn(2, 6, 7)
    before = conv(x)
    model = get_peft_model(nn.Sequential(conv), RosaConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("hook", ["pre", "post", "both"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_compiled_and_exported_it_computes_the_same(kind, hook, with_kwargs):
    layer = LAYERS[kind]()
    x: Tensor = torch.randint(9, (4, 3)) if kind == "embedding" else torch.randn(4, 6, 6)
    if with_kwargs and hook != "post":
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: (halve_the_inputs(m, args), kwargs), with_kwargs=True
        )
    if with_kwargs and hook != "pre":
        layer.register_forward_hook(
            lambda m, args, kwargs, out: clamp_the_outputs(m, args, out), with_kwargs=True
        )
    if not with_kwargs:
        HOOKS[hook](layer)
    model: Any = get_peft_model(nn.Sequential(layer), RosaConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    exported = torch.export.export(model.base_model.model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), expected)
