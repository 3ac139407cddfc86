"""Layers whose weight a model reads, and models that change a layer's output in place."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from rosa import RosaCallback, RosaConfig, resample, watch
from rosa.layers.in_model import rosa_layers
from tests.helpers import seen_by


class Reading(nn.Module):
    """Reads the weights of all its layers, each in another way."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 5), nn.Linear(5, 7), Conv1D(4, 7)
        with torch.no_grad():
            self.three.weight.normal_(0, 0.5)

    def forward(self, x):
        x = torch.tanh(F.linear(x, self.one.weight, self.one.bias))
        x = torch.tanh(x @ self.two.weight.T + self.two.bias)
        return torch.addmm(self.three.bias, x, self.three.weight)


class Calling(Reading):
    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


OPTIONS = {"r": 2, "target_modules": ["one", "two", "three"]}
X = torch.randn(8, 6).double()


def pair(**options):
    reading = Reading().double()
    calling = Calling().double()
    calling.load_state_dict(reading.state_dict())
    config = {**OPTIONS, **options}
    return [get_peft_model(m, RosaConfig(**copy.deepcopy(config))) for m in (reading, calling)]


@pytest.mark.parametrize(
    "options", [{}, {"directions": "svd", "trained": "B"}, {"alpha": 5.0, "trained": "A"}]
)
def test_a_model_that_reads_weights_trains_like_one_that_calls_layers(options):
    models = pair(**options)
    with torch.no_grad():
        assert torch.equal(models[0](X), models[0](X))
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in models]
    for step in range(9):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 2:
                watch(model)
            if step in (4, 7):
                with warnings.catch_warnings():
                    warnings.simplefilter("error" if step == 4 else "ignore")  # all were seen
                    resample(model, optimizer)
            optimizer.zero_grad()
            (model(X) - 1).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(models[0](X), models[1](X), rtol=1e-6, atol=1e-8)
    with models[0].disable_adapter(), models[1].disable_adapter():
        torch.testing.assert_close(models[0](X), models[1](X))
    models[0].merge_adapter()
    torch.testing.assert_close(models[0](X), models[1](X), rtol=1e-6, atol=1e-8)


def test_reading_what_a_weight_is_like_computes_nothing(monkeypatch):
    model, _ = pair()
    monkeypatch.setattr("rosa.layers.effective._product", None)
    for _, layer in rosa_layers(model):
        weight, base = layer.weight, layer.base_layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (base.shape, base.dtype, base.device)
        assert isinstance(weight, torch.Tensor)
        assert weight.numel() == base.numel()
        assert weight.requires_grad
        assert weight.ndim == 2


def test_what_is_read_is_a_tensor_like_any_other():
    model, _ = pair()
    for _, layer in rosa_layers(model):
        with torch.no_grad():
            layer.rosa_B["default"].add_(torch.randn_like(layer.rosa_B["default"]))
        change = layer.get_delta_weight("default")
        weight = layer.pretrained_weight()
        expected = (weight.T if layer.base_weight.view.transposed else weight) + change
        for found in (
            layer.weight + 0,
            layer.weight.detach(),
            layer.weight.data,
            layer.weight.clone(),
            layer.weight.T.T,
            layer.weight.float().double(),
            torch.cat([layer.weight]),
            layer.weight[:],
        ):
            torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="can be read but not written to"), torch.no_grad():
            layer.weight.add_(1.0)
        with pytest.raises(ValueError, match="can be read but not written to"), torch.no_grad():
            nn.init.zeros_(layer.weight)


def test_the_value_read_is_kept_for_the_backward_pass():
    model, _ = pair()
    model.add_adapter("other", RosaConfig(**OPTIONS, seed=3))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    loss = model(x).sum()
    model.set_adapter("other")  # the weight in memory is another one now
    loss.backward()
    torch.testing.assert_close(x.grad, expected)


class InPlace(nn.Module):
    """Changes its layers' outputs in place, as several attentions do."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = self.one(x)
        x /= 2.0
        y = self.two(x.tanh())
        y[:, 0] += 1.0
        z = self.three(y.tanh()).view(-1, 2, 2)
        z.mul_(0.5)
        return z.flatten(1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])  # the fused form and the plain one
@pytest.mark.parametrize("shape", [(8, 6), (2, 4, 6)])
def test_outputs_may_be_changed_in_place_while_watched(dropout, shape):
    base = InPlace().double()
    model = get_peft_model(base, RosaConfig(**OPTIONS, rosa_dropout=dropout)).eval()
    x = torch.randn(*shape).double().reshape(-1, 6)
    sums = []
    for form in ("as it is", "hooked"):
        watch(model)
        handles = [
            layer.base_layer.register_forward_hook(lambda *_: None)  # which takes the plain form
            for _, layer in rosa_layers(model)
            if form == "hooked"
        ]
        model(x).square().sum().backward()
        sums.append([seen_by(layer).total for _, layer in rosa_layers(model)])
        for handle in handles:
            handle.remove()
    for one, two in zip(*sums, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, two)
    resample(model)


def test_two_adapters_before_one_backward_pass_are_told_apart_in_every_form():
    for hooked in (False, True):
        model = get_peft_model(InPlace(), RosaConfig(**OPTIONS))
        model.add_adapter("other", RosaConfig(**OPTIONS, seed=1))
        if hooked:
            for _, layer in rosa_layers(model):
                layer.base_layer.register_forward_hook(lambda *_: None)
        first = model(X.float()).sum()
        model.set_adapter("other")
        second = model(X.float()).sum()
        with pytest.raises(RuntimeError, match="another adapter was made active"):
            (first + second).backward()


def normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight_norm(nn.Linear(4, 3))


@pytest.mark.parametrize(
    "computed",
    [
        normed,
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
        lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 3)),
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
    ],
)
def test_weights_that_are_computed_from_others_are_refused(computed):
    base = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), second=computed()))
    x = torch.randn(2, 4)
    expected = base.eval()(x)
    with pytest.raises(ValueError, match="the weight of second is computed from others"):
        get_peft_model(base, RosaConfig(r=1, target_modules=["first", "second"]))
    torch.testing.assert_close(base(x), expected)
    get_peft_model(base, RosaConfig(r=1, target_modules=["first"]))


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x, labels):
        return {"loss": (self.used(x) - labels).square().mean()}


def test_layers_that_the_first_step_did_not_use_are_named(tmp_path):
    model = get_peft_model(Idle(), RosaConfig(r=1, target_modules=["used", "unused"]))
    rows = [{"x": torch.randn(6), "labels": torch.randn(4)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[RosaCallback(every=2)])
    with pytest.warns(UserWarning, match="1 of 2 adapted layers got no gradient .* unused") as seen:
        trainer.train()
    assert sum("got no gradient" in str(w.message) for w in seen) == 1


def test_a_weight_that_was_asked_for_is_of_one_state():
    (model, _) = pair(directions="svd")
    layer = model.base_model.model.one
    with torch.no_grad():
        layer.rosa_B["default"].add_(0.3)
        now = layer.weight
        at_once = pytest.raises(ValueError, match=r"Read it at once: layer.weight.clone\(\)")
        with model.disable_adapter(), at_once:
            now - layer.weight
        torch.testing.assert_close(now - layer.weight, torch.zeros_like(now))  # it is back
        now = layer.weight
        layer.rosa_B["default"].add_(0.3)
        with pytest.raises(ValueError, match="or the factors stepped or loaded"):
            now.norm()
        read = layer.weight.clone()
        resample(model)
        torch.testing.assert_close(layer.weight.clone(), read)
