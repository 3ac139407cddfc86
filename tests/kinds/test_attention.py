"""Torch's own attention: it computes with both of its changed weights, in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rosa import RosaConfig, export_lora, export_merged, resample, watch
from rosa.errors import ExportError
from rosa.layers.in_model import rosa_layers
from tests.helpers import moved

WIDTH = 16


class Reader(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.attention(x, x, x, key_padding_mask=padding)[0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.layers(x, src_key_padding_mask=padding))


TARGETS: list[Any] = [["attention", "self_attn"], "all-linear"]


@pytest.fixture(params=[Reader, Encoder])
def base(request: pytest.FixtureRequest, _fresh_random_inputs: None) -> nn.Module:
    model = request.param().double().eval()
    for name, parameter in model.named_parameters():  # torch begins with biases at zero
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def attach(base: nn.Module, targets: Any = TARGETS[0], **options: Any) -> Any:
    config = RosaConfig(**{"r": 3, "alpha": 2.0, "target_modules": targets, **options})
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def inputs() -> Tensor:
    return torch.randn(4, 5, WIDTH, dtype=torch.float64)


def changed(model: Any, plain: nn.Module) -> nn.Module:
    """A plain model whose weights are what the adapted one's are said to be."""
    with torch.no_grad():
        for name, layer in rosa_layers(model.base_model.model):
            path = name.replace(".base_layer", "")
            weight = plain.get_parameter(f"{path}.{layer.parameter_name}")
            weight.add_(layer.whole_change("default").dense())
    return plain


@pytest.mark.parametrize("targets", TARGETS, ids=["named", "all-linear"])
def test_both_weights_are_adapted_in_every_mode(base, targets):
    x, plain = inputs(), copy.deepcopy(base)
    model = attach(base, targets)
    names = [name for name, _ in rosa_layers(model)]
    assert sum("attn" in name or "attention" in name for name in names) == 2 * (
        2 if isinstance(plain, Encoder) else 1
    )
    torch.testing.assert_close(model(x), plain(x))
    moved(model, 0.1)
    resample(model)
    moved(model, 0.1)
    expected = changed(model, copy.deepcopy(plain))
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    for training in (True, False):
        for grad in (True, False):
            model.train(training)
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(x), expected(x))
                found = model(x, padding)[~padding]
                torch.testing.assert_close(found, expected(x, padding)[~padding])
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.merge_and_unload()(x), expected(x))


def test_gradients_are_those_of_the_changed_weights(base):
    x, plain = inputs(), copy.deepcopy(base).requires_grad_(True)
    model = attach(base)
    moved(model, 0.1)
    plain = changed(model, plain)
    expected = plain(x)
    of = torch.randn_like(expected)
    assert watch(model) > 0
    (model(x) * of).sum().backward()
    (expected * of).sum().backward()
    for name, layer in rosa_layers(model.base_model.model):
        path = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
        gradient = plain.get_parameter(path).grad
        adapter = layer.adapters["default"]
        a, b = adapter.factors
        assert gradient is not None
        torch.testing.assert_close(b.grad, adapter.scaling * gradient @ a.T)
        torch.testing.assert_close(a.grad, adapter.scaling * b.T @ gradient)
        assert adapter.sketch is not None
        torch.testing.assert_close(adapter.sketch.total.T, gradient @ adapter.sketch.test)


def test_it_is_saved_loaded_unloaded_and_takes_turns(base, tmp_path):
    x, plain = inputs(), copy.deepcopy(base)
    model = attach(base)
    moved(model, 0.1)
    resample(model)
    learned = model(x)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(loaded(x), learned)
    model.add_adapter("other", RosaConfig(r=2, target_modules=TARGETS[0]))
    model.set_adapter("other")
    torch.testing.assert_close(model(x), plain(x))
    moved(model, 0.1)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), learned)
    model.delete_adapter("other")
    export_merged(model, tmp_path / "merged")
    merged = copy.deepcopy(plain)
    merged.load_state_dict(torch.load(tmp_path / "merged" / "pytorch_model.bin"))
    torch.testing.assert_close(merged(x), learned)
    unloaded = model.unload()
    assert not list(rosa_layers(unloaded))
    torch.testing.assert_close(dict(unloaded.state_dict()), dict(plain.state_dict()))


def test_what_peft_computes_of_a_lora_there_is_something_else(base, tmp_path):
    """Hence no export: once this test fails, PEFT has mended it."""
    x = inputs()
    lora: Any = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=3, target_modules=TARGETS[0], init_lora_weights=False),
        autocast_adapter_dtype=False,
    ).eval()
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for name, module in expected.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                layer = lora.get_submodule(f"base_model.model.{name}")
                module.in_proj_weight.add_(layer.get_delta_weight("default"))
                inside = layer.base_layer.out_proj
                module.out_proj.weight.add_(inside.get_delta_weight("default"))
    assert not torch.allclose(lora(x), expected(x))
    model = attach(base)
    moved(model, 0.1)
    model(x)
    with pytest.raises(ExportError, match=r"twice|no effect"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="name the attention instead"):
        attach(Reader(), ["out_proj"])
    with pytest.raises(ValueError, match="leave rosa_dropout at 0"):
        attach(Reader(), rosa_dropout=0.1)
    with pytest.raises(ValueError, match="MultiheadAttention, which is not supported"):
        attach(Reader(kdim=8, vdim=8))
    broken = Reader()
    nn.init.constant_(broken.attention.out_proj.weight, float("nan"))
    with pytest.raises(ValueError, match=r"attention.out_proj has NaN"):
        attach(broken)
    assert not list(rosa_layers(broken))
    with pytest.warns(UserWarning, match="all-linear leaves out attention"):
        model = attach(Reader(kdim=8, vdim=8), "all-linear")
    assert [name.rpartition(".")[2] for name, _ in rosa_layers(model)] == ["head"]
