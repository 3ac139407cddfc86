"""Half-precision weights through many draws with training between: off by one rounding, never more.

Held against the ideal, computed in float64: the pretrained weight plus all that was learned.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rosa import RosaConfig, export_lora, resample
from rosa.layers.base import RosaLayer
from rosa.layers.in_model import rosa_layers

NAMES = ["words", "images", "linear"]
HALVES = [torch.float16, torch.bfloat16]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 12, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bti->bto", self.weights, x)


class Kinds(nn.Module):
    """A layer of every kind."""

    def __init__(self, dtype: torch.dtype, experts: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.images = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 12)
        self.last = Experts() if experts else Conv1D(5, 12)  # PEFT's LoRA does not do with both
        if not experts:
            nn.init.normal_(self.last.weight, std=0.3)
        self.to(dtype)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        ids, pixels = x
        seen = self.images(pixels).mean((-1, -2))[:, None]
        return self.last(torch.tanh(self.linear(torch.tanh(self.words(ids) + seen))))


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randint(20, (6, 4)), torch.randn(6, 3, 5, 5).to(dtype)


@pytest.fixture(params=HALVES, ids=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, _fresh_random_inputs: None) -> torch.dtype:
    return request.param


def trained(base: nn.Module, dtype: torch.dtype, rounds: int = 20) -> Any:
    """A model that has learned in many subspaces."""
    experts = hasattr(base.last, "weights")
    last: Any = {"target_parameters": ["last.weights"]} if experts else {}
    names = NAMES if experts else [*NAMES, "last"]
    model: Any = get_peft_model(base, RosaConfig(r=2, target_modules=names, **last))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    x = inputs(dtype)
    target = torch.randn_like(model(x))
    for _ in range(rounds):
        for _ in range(3):
            (model(x) - target).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        resample(model, optimizer)
    for _ in range(3):
        (model(x) - target).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def layers(model: Any) -> dict[str, RosaLayer]:
    return {name.rpartition(".")[2]: layer for name, layer in rosa_layers(model)}


def weight_of(model: nn.Module, name: str) -> Tensor:
    module = model.get_submodule(name)
    return module.weights if isinstance(module, Experts) else module.weight


def as_matrix(layer: RosaLayer, weight: Tensor) -> Tensor:
    return layer.base_weight.view.as_matrix(weight.detach()).double()


def assert_one_rounding(found: Tensor, before: Tensor, change: Any, dtype: torch.dtype) -> None:
    """``found`` is ``before + change``, summed in float32 and rounded once to ``dtype``.

    The float32 sum is off by its terms' sizes, which cancellation makes larger than the sum's own.
    """
    info, B, A = torch.finfo(dtype), change.B.double(), change.A.double()
    ideal, size = before + B @ A, before.abs() + B.abs() @ A.abs()
    rounding = 0.5 * info.eps * ideal.abs() + info.smallest_normal * info.eps
    summing = (B.shape[-1] + 2) * torch.finfo(torch.float32).eps * size
    assert bool(((found - ideal).abs() <= rounding + summing).all())


@pytest.mark.parametrize("experts", [False, True])
def test_all_forms_of_it_are_one_rounding_from_the_ideal(dtype, experts, tmp_path):
    base = Kinds(dtype, experts)
    pretrained, fresh = copy.deepcopy(base), copy.deepcopy(base)
    model = trained(base, dtype)
    before, learned = {}, {}
    for name, layer in layers(model).items():
        before[name] = as_matrix(layer, weight_of(pretrained, name))
        change, offset = layer.whole_change("default"), layer.adapters["default"].terms
        learned[name] = change
        assert float((change.B @ change.A).norm()) > 0.05 * float(before[name].norm())
        standing = as_matrix(layer, layer.base_weight.parameter)
        assert_one_rounding(standing, before[name], offset, dtype)

    model.save_pretrained(str(tmp_path / "own"))
    loaded = layers(PeftModel.from_pretrained(copy.deepcopy(fresh), str(tmp_path / "own")))
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_weight.parameter, loaded[name].base_weight.parameter)
        for one, other in zip(
            layer.adapters["default"].factors, loaded[name].adapters["default"].factors, strict=True
        ):
            assert torch.equal(one, other)

    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(fresh), str(tmp_path / "lora"))
    for name, layer in layers(model).items():
        module = lora.base_model.model.get_submodule(name)
        found = module.get_delta_weight("default")
        change = layer.whole_change("default")
        expected = change.B.double() @ change.A.double()
        if expected.dim() == 3:  # PEFT rounds the change of a parameter to its precision
            expected = expected.to(dtype).double()
        tolerance = 2 * torch.finfo(dtype).eps if expected.dim() == 3 else 1e-4
        torch.testing.assert_close(as_matrix(layer, found), expected, rtol=tolerance, atol=1e-5)

    with model.disable_adapter():
        for name, layer in layers(model).items():
            assert torch.equal(layer.base_weight.parameter, weight_of(pretrained, name))
    merged = copy.deepcopy(model).merge_and_unload()
    for name, layer in layers(model).items():
        weight = weight_of(merged, name)
        assert weight.dtype == dtype
        assert_one_rounding(as_matrix(layer, weight), before[name], learned[name], dtype)
    for name, weight in pretrained.state_dict().items():
        assert torch.equal(model.unload().state_dict()[name], weight)


def test_the_copy_of_the_pretrained_weight_costs_what_the_docs_say(dtype):
    """One more of each adapted weight in main memory, while an offset stands in it."""
    model = trained(Kinds(dtype, experts=True), dtype, rounds=1)
    for layer in layers(model).values():
        assert layer.base_weight.copy is not None
    with model.disable_adapter():
        for layer in layers(model).values():
            assert layer.base_weight.copy is None


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.images(x).mean((-1, -2)))


def test_weights_that_hooks_cast_for_each_pass_compute_in_that_precision():
    """As diffusers' layer-wise casting: they lie in half precision, and inputs are left alone."""

    def cast(module: nn.Module, dtype: torch.dtype) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    model: Any = get_peft_model(Pixels(), RosaConfig(r=2, target_modules=["images", "linear"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        x = torch.randn(6, 3, 5, 5)
        expected = model(x)
    model.to(torch.float16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda m, _: cast(m, torch.float32))
            module.register_forward_hook(lambda m, *_: cast(m, torch.float16))
    with torch.no_grad(), disable_input_dtype_casting(model):
        found = model(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
