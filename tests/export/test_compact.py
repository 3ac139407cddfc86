"""An adapter's own file, smaller: the same model, from which training goes on."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from rosa import RosaConfig, export_rosa, resample
from rosa.errors import ExportError
from rosa.export import compact
from rosa.layers.in_model import rosa_layers
from tests.helpers import fails, moved, run, trained_run
from tests.models import Mlp

FILE = "adapter_model.safetensors"


class Wide(torch.nn.Module):
    """A weight of which a few rounds do not fill the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(40, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def attach(base: Any, **options: Any) -> Any:
    config = {"r": 2, "target_modules": ["first", "middle"], "modules_to_save": ["last"]}
    return get_peft_model(copy.deepcopy(base), RosaConfig(**(config | options))).eval()


def trained(base: Any, rounds: int = 6, **options: Any) -> Any:
    model = attach(base, **options)
    for round_ in range(rounds):
        moved(model)
        if round_ < rounds - 1:
            resample(model)
    return model


def terms(folder: Any) -> int:
    return sum(v.shape[0] for k, v in load_file(folder / FILE).items() if k.endswith("offset.A"))


@pytest.mark.parametrize("learns", ["both", "A", "B"])
@pytest.mark.parametrize("directions", ["orthonormal", "svd", "zero"])
def test_it_is_the_same_model_and_training_goes_on(tmp_path, learns, directions):
    if (learns, directions) == ("A", "zero"):
        pytest.skip("refused by the config")
    base, x = Mlp(torch.float32), torch.randn(5, 7)
    model = trained(base, trained=learns, directions=directions, alpha=3)
    expected = model(x)
    model.save_pretrained(tmp_path / "whole")
    errors = export_rosa(model, tmp_path / "small")
    assert errors == {"first": 0.0, "middle": 0.0}
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert terms(tmp_path / "small") <= terms(tmp_path / "whole")
    small: Any = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "small", is_trainable=True
    ).eval()
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-4)
    for (_, one), (_, two) in zip(rosa_layers(model), rosa_layers(small), strict=True):
        assert one.adapters["default"].draws == two.adapters["default"].draws
    before = small(x)
    before.square().sum().backward()
    for _, layer in rosa_layers(small):
        gradients = [f.grad for f in layer.adapters["default"].factors if f.requires_grad]
        assert any(g is not None and g.abs().max() > 0 for g in gradients)
        taken_out = layer.adapters["default"].drawn()
        if directions == "zero":
            assert taken_out is None
        else:
            assert not taken_out.dense().any()
    resample(small)
    torch.testing.assert_close(small(x), before, rtol=0, atol=1e-4)
    moved(small)
    resample(small)


@pytest.mark.parametrize("learns", ["both", "A", "B"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_no_file_is_longer_than_the_one_that_was_trained(tmp_path, learns, rounds):
    base, x = Wide(), torch.randn(5, 40)
    model = trained(base, rounds, trained=learns, target_modules=["first"], modules_to_save=None)
    model.save_pretrained(tmp_path / "whole")
    export_rosa(model, tmp_path / "small")
    sizes = [(tmp_path / name / FILE).stat().st_size for name in ("small", "whole")]
    assert sizes[0] <= sizes[1]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small").eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_off_by_one_rounding_of_the_change(tmp_path, dtype):
    base = Mlp(torch.float32)
    model = trained(base)
    errors = export_rosa(model, tmp_path / "half", dtype=dtype)
    state = load_file(tmp_path / "half" / FILE)
    assert {v.dtype for k, v in state.items() if "rosa_" in k and "draws" not in k} == {dtype}
    assert all(state[k].dtype == torch.float32 for k in state if "last" in k)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "half")
    for (_, one), (_, two) in zip(rosa_layers(model), rosa_layers(loaded), strict=True):
        whole, found = (layer.whole_change("default").dense() for layer in (one, two))
        error = float((whole - found).norm() / whole.norm())
        assert error == pytest.approx(errors[one.name], rel=0.05)
        assert 0 < error < 2 * torch.finfo(dtype).eps


def test_fewer_terms_on_request(tmp_path):
    model = trained(Mlp(torch.float32))
    errors = export_rosa(model, tmp_path / "small", rank=1)
    assert all(0 < error < 1 for error in errors.values())
    assert terms(tmp_path / "small") == 2 * (1 + 2)  # of each layer, and those of its factors
    export_rosa(model, tmp_path / "most", energy=0.99)
    assert terms(tmp_path / "small") < terms(tmp_path / "most")


@pytest.mark.parametrize("key", ["offset.A", "rosa_B"])
def test_a_file_that_holds_something_else_is_not_left_behind(tmp_path, monkeypatch, key):
    def lossy(state: Any, path: Any, **kwargs: Any) -> None:
        name = next(k for k in state if k.endswith(key))
        save_file({**state, name: state[name] + 1e-3}, path, **kwargs)

    monkeypatch.setattr(compact, "save_file", lossy)
    with pytest.raises(ExportError, match="PEFT loads something else for first"):
        export_rosa(trained(Mlp(torch.float32)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path, capsys):
    trained_run(tmp_path, steps=8)
    capsys.readouterr()
    to = ["export", tmp_path / "run", "--to", "rosa", "--output"]
    run(*to, tmp_path / "small")
    assert "largest difference of logits" in capsys.readouterr().out
    run(*to, tmp_path / "half", "--dtype", "bfloat16")
    assert "relative error of the change" in " ".join(capsys.readouterr().out.split())
    sizes = [
        (folder / FILE).stat().st_size
        for folder in (tmp_path / "run" / "adapter", tmp_path / "small", tmp_path / "half")
    ]
    assert sizes == sorted(sizes, reverse=True)
    config = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    assert config["peft_type"] == "ROSA"
    run("export", tmp_path / "half", "--to", "lora", "--output", tmp_path / "lora")
    assert "are for --to merged" in fails(capsys, *to, tmp_path / "x", "--low-memory")
