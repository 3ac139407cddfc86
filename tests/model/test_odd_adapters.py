"""Adapters of one model that differ in what they adapt, or lie inside one another."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rosa import RosaConfig, export_lora, export_merged, export_rosa, resample
from rosa.errors import UserError
from rosa.layers.in_model import layers_of
from tests.helpers import moved
from tests.models import tiny_gpt2


class Block(nn.Module):
    """Has a parameter and modules of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(5, 6))
        self.lin = nn.Linear(6, 5)
        self.sub = nn.Sequential(nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.sub(torch.tanh(x @ self.gate.T + self.lin(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.last(self.attention(x, x, x)[0])


CONFIGS: dict[str, dict[str, Any]] = {
    "inside": {"target_modules": ["lin", "0"]},
    "inside-whole-names": {"target_modules": ["block.lin", "block.sub.0"]},
    "inside-regex": {"target_modules": r"block\.(lin|sub\.0)"},
    "last": {"target_modules": ["last"]},
    "attention": {"target_modules": ["attention"]},
    "all": {"target_modules": "all-linear"},
    "gate": {"target_modules": [], "target_parameters": ["block.gate"]},
    "gate-and-last": {"target_modules": ["last"], "target_parameters": ["block.gate"]},
    "gate-and-inside": {"target_modules": ["lin"], "target_parameters": ["block.gate"]},
    "gate-and-all": {"target_modules": "all-linear", "target_parameters": ["block.gate"]},
    "lin.weight": {"target_modules": [], "target_parameters": ["lin.weight"]},
    "lin.weight-and-inside": {"target_modules": ["0"], "target_parameters": ["lin.weight"]},
    "save-block": {"target_modules": ["last"], "modules_to_save": ["block"]},
    "save-sub": {"target_modules": ["lin"], "modules_to_save": ["sub"]},
    "gate-save-block": {
        "target_modules": ["last"],
        "target_parameters": ["block.gate"],
        "modules_to_save": ["block"],
    },
    "gate-save-sub": {
        "target_modules": [],
        "target_parameters": ["block.gate"],
        "modules_to_save": ["sub"],
    },
    "out_proj-and-last": {"target_modules": ["out_proj", "last"]},
}
REFUSED = {"gate-and-inside", "gate-and-all", "gate-save-block", "gate-save-sub"}
REFUSED |= {"out_proj-and-last"}


def config_of(name: str) -> RosaConfig:
    return RosaConfig(r=2, alpha=3.0, **copy.deepcopy(CONFIGS[name]))


def names_of(model: Any, adapter: str) -> set[str]:
    """What an adapter is in, by the names of a plain model."""
    layers = layers_of(model.base_model.model, adapter).items()
    return {f"{name}.{layer.weight_path}".replace(".base_layer", "") for name, layer in layers}


def train(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved(model)
        resample(model)
        moved(model)


def attached(base: nn.Module, name: str) -> Any:
    return get_peft_model(copy.deepcopy(base), config_of(name), autocast_adapter_dtype=False)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def check(model: Any, adapter: str, base: nn.Module, x: Tensor, folder: Path) -> None:
    """An adapter is saved, merged, exported and taken out again as what it computes."""
    with torch.no_grad():
        model.set_adapter(adapter)
        expected, plain = model(x), base(x)
        model.save_pretrained(folder / "saved", selected_adapters=[adapter])
        saved = folder / "saved" / ("" if adapter == "default" else adapter)
        close(PeftModel.from_pretrained(copy.deepcopy(base), str(saved))(x), expected)
        low = PeftModel.from_pretrained(copy.deepcopy(base), str(saved), low_cpu_mem_usage=True)
        close(low(x), expected)
        export_merged(model, folder / "merged", adapter)
        merged = copy.deepcopy(base)
        merged.load_state_dict(torch.load(folder / "merged" / "pytorch_model.bin"))
        close(merged(x), expected)
        export_rosa(model, folder / "rosa", adapter)
        close(PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "rosa"))(x), expected)
        if not any("attention" in name for name in names_of(model, adapter)):
            export_lora(model, folder / "lora", adapter)
            lora = PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "lora"))
            close(lora(x), expected)
        close(copy.deepcopy(model).merge_and_unload(adapter_names=[adapter])(x), expected)
        unloaded = copy.deepcopy(model).unload()
        assert unloaded.state_dict().keys() == base.state_dict().keys()
        if not model.peft_config[adapter].modules_to_save:  # PEFT leaves those as trained
            close(unloaded(x), plain)
            with model.disable_adapter():
                close(model(x), plain)
        model.merge_adapter()
        close(model(x), expected)
        model.unmerge_adapter()
        close(model(x), expected)


@pytest.fixture
def base(_fresh_random_inputs: None) -> nn.Module:
    return Model().double().eval()


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - REFUSED))
def test_one_adapter_is_saved_exported_and_taken_out(base, name, tmp_path):
    model = attached(base, name)
    train(model)
    check(model, "default", base, torch.randn(2, 3, 6).double(), tmp_path)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_lies_inside_another_is_refused_before_anything_is_changed(base, name):
    model, state = copy.deepcopy(base), base.state_dict()
    with pytest.raises(UserError):
        get_peft_model(model, config_of(name))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


PAIRS = list(itertools.product(sorted(CONFIGS.keys() - REFUSED), sorted(CONFIGS)))


@pytest.mark.filterwarnings("ignore:all-linear leaves out")
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_adapters_are_as_each_alone_or_the_second_is_refused(base, first, second, tmp_path):
    x = torch.randn(2, 3, 6).double()
    model = attached(base, first)
    train(model)
    before, modules = model(x), [type(m) for m in model.modules()]
    try:
        model.add_adapter("other", config_of(second))
    except UserError:
        assert modules == [type(m) for m in model.modules()]
        assert torch.equal(model(x), before)
        assert list(model.peft_config) == ["default"]
        return
    out_of_reach = {"block.lin.weight", "block.sub.0.weight"} if "gate" in first else set()
    if first.startswith("lin.weight"):
        out_of_reach = {"block.lin.weight"}
    if second == "gate-and-all":  # what is around the others is adapted already
        assert "gate" in first
        expected = names_of(attached(base, "gate"), "default")
        expected |= names_of(attached(base, "all"), "default")
    else:
        assert second not in REFUSED
        expected = names_of(attached(base, second), "default")
    if "all" in second:
        expected -= out_of_reach
    assert names_of(model, "other") == expected
    model.set_adapter("other")
    train(model)
    after = model(x)
    check(model, "other", base, x, tmp_path / "other")
    check(model, "default", base, x, tmp_path / "default")
    close(model(x), before)
    model.set_adapter("other")
    close(model(x), after)


def test_all_linear_says_what_it_cannot_reach(base):
    model = attached(base, "gate")
    with pytest.warns(UserWarning, match=r"all-linear leaves out block\.lin, block\.sub\.0"):
        model.add_adapter("other", config_of("all"))
    assert "attention.in_proj_weight" in names_of(model, "other")


@pytest.mark.parametrize("first", ["last", "attention", "inside"])
@pytest.mark.parametrize("second", ["gate", "last", "inside"])
def test_adapters_of_different_layers_are_loaded_without_memory_first(
    base, first, second, tmp_path
):
    x, expected = torch.randn(2, 3, 6).double(), {}
    for name in (first, second):
        model = attached(base, name)
        train(model)
        model.save_pretrained(tmp_path / name)
        expected[name] = model(x)
    for low in itertools.product((False, True), repeat=2):
        both = copy.deepcopy(base)
        if first == "inside" and second == "gate":
            continue  # one lies in the other
        both = PeftModel.from_pretrained(both, str(tmp_path / first), low_cpu_mem_usage=low[0])
        both.load_adapter(str(tmp_path / second), "other", low_cpu_mem_usage=low[1])
        close(both(x), expected[first])
        both.set_adapter("other")
        close(both(x), expected[second])


@pytest.mark.parametrize("export", [export_lora, export_merged, export_rosa])
def test_of_several_active_adapters_the_one_to_export_is_asked_for(base, export, tmp_path):
    model = attached(base, "last")
    model.add_adapter("other", config_of("inside"))
    model.base_model.set_adapter(["default", "other"])
    train(model)
    with pytest.raises(UserError, match=r"default, other.*adapter_name"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", "other")
    assert any((tmp_path / "out").iterdir())


TOKENS: dict[str, dict[str, Any]] = {
    "none": {"target_modules": ["c_attn"]},
    "some": {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2, 3]},
    "others": {"target_modules": ["c_fc"], "trainable_token_indices": {"wte": [4, 5]}},
    "places": {"target_modules": ["c_fc"], "trainable_token_indices": {"wpe": [4]}},
    "whole": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
}
TOGETHER = [("some", "others"), ("others", "some"), ("some", "some"), ("places", "places")]
APART = [
    pair
    for pair in itertools.product(TOKENS, repeat=2)
    if pair not in TOGETHER and len({*pair}) > 1
]


def test_tokens_are_those_of_the_embedding_that_a_model_names():
    """One that is no transformers model may name it too, as PEFT asks."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.other = nn.Embedding(20, 8), nn.Embedding(20, 8)
            self.lin = nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.lin(self.words(ids) + self.other(ids))

        def get_input_embeddings(self) -> nn.Module:
            return self.words

    config = RosaConfig(r=2, target_modules=["lin"], trainable_token_indices=[0, 3])
    model = get_peft_model(Named(), config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("words" in name for name in trained) == 1
    assert not any("other" in name for name in trained)


def with_tokens(base: nn.Module, name: str) -> Any:
    return get_peft_model(copy.deepcopy(base), RosaConfig(r=2, **copy.deepcopy(TOKENS[name])))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("first", "second"), TOGETHER)
def test_adapters_that_train_tokens_of_one_embedding_keep_to_themselves(
    first, second, tied, tmp_path
):
    base, ids = tiny_gpt2(tied).eval(), torch.randint(50, (2, 7))
    model, expected = with_tokens(base, first), {}
    train(model)
    model.add_adapter("other", RosaConfig(r=2, **copy.deepcopy(TOKENS[second])))
    model.set_adapter("other")
    train(model)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        expected[adapter] = model(ids).logits
    model.save_pretrained(tmp_path)
    for adapter, logits in expected.items():
        folder = tmp_path / ("" if adapter == "default" else adapter)
        alone = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        torch.testing.assert_close(alone(ids).logits, logits)
        model.set_adapter(adapter)
        torch.testing.assert_close(model(ids).logits, logits)
        export_merged(model, tmp_path / f"merged-{adapter}", adapter)
        merged = type(base).from_pretrained(tmp_path / f"merged-{adapter}")
        torch.testing.assert_close(merged(ids).logits, logits)


@pytest.mark.parametrize(("first", "second"), APART)
def test_adapters_that_train_tokens_beside_others_are_refused(first, second):
    base, ids = tiny_gpt2().eval(), torch.randint(50, (2, 7))
    if {first, second} == {"none", "whole"}:
        return
    model = with_tokens(base, first)
    train(model)
    before, modules = model(ids).logits, [type(m) for m in model.modules()]
    with pytest.raises(UserError, match="same embeddings"):
        model.add_adapter("other", RosaConfig(r=2, **copy.deepcopy(TOKENS[second])))
    assert modules == [type(m) for m in model.modules()]
    assert torch.equal(model(ids).logits, before)


def test_an_embedding_is_trained_in_part_or_in_full():
    config = RosaConfig(r=2, **TOKENS["some"], modules_to_save=["wte"])
    with pytest.raises(UserError, match="would be trained as well"):
        get_peft_model(tiny_gpt2(), config)


@pytest.mark.parametrize("of", ["model", "tuner"])
@pytest.mark.parametrize("broken", ["block.lin", "block.sub.0"])
def test_a_refused_switch_leaves_all_as_it_was(base, of, broken):
    model = attached(base, "inside")
    train(model)
    model.add_adapter("other", config_of("inside"))
    with torch.no_grad():
        model.base_model.model.get_submodule(broken).base_layer.weight.add_(1)
    with pytest.raises(UserError, match="offset stood in it"):
        (model if of == "model" else model.base_model).set_adapter("other")
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]
    layers = layers_of(model, "default").values()
    assert all(each.active_adapters == ["default"] for each in layers)
    with pytest.warns(UserWarning, match="taken for"), model.disable_adapter():
        pass
    model.set_adapter("other")
    assert model.active_adapter == "other"


def test_a_switch_that_fails_halfway_is_taken_back(base, monkeypatch):
    x = torch.randn(2, 3, 6).double()
    model = attached(base, "save-sub")
    train(model)
    config = config_of("save-sub")
    config.target_modules = {"lin", "last"}
    model.add_adapter("other", config)
    before = model(x)
    last = model.base_model.model.last
    monkeypatch.setattr(type(last), "set_adapter", _fails_for(last, type(last).set_adapter))
    with pytest.raises(RuntimeError, match="halfway"):
        model.set_adapter("other")
    assert model.active_adapter == "default"
    close(model(x), before)
    assert model.active_adapters == ["default"]


def _fails_for(layer: Any, method: Any) -> Any:
    def set_adapter(self: Any, names: Any, *args: Any, **kwargs: Any) -> None:
        if self is layer and "other" in names:
            raise RuntimeError("halfway")
        method(self, names, *args, **kwargs)

    return set_adapter


@pytest.mark.parametrize("name", ["inside", "attention", "gate-and-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_in_two_parts_with_a_use_between_is_the_whole_one(base, name, dtype):
    base, x = base.to(dtype), torch.randn(2, 3, 6, dtype=dtype)
    model = attached(base, name)
    train(model)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    weights = {k for k in state if ".rosa_" not in k}
    fresh = attached(base, name)
    for part in (state.keys() - weights, weights):
        fresh.load_state_dict({k: state[k] for k in part}, strict=False)
        torch.testing.assert_close(fresh(x), expected)
    with fresh.disable_adapter():
        torch.testing.assert_close(fresh(x), base(x))
    other = Model().to(dtype).eval()  # weights of another model are taken for what they are
    plain = other.state_dict()
    known = {k.replace("base_model.model.", "").replace(".base_layer", ""): k for k in weights}
    fresh.load_state_dict({known[k]: v for k, v in plain.items()}, strict=False)
    with fresh.disable_adapter():
        torch.testing.assert_close(fresh(x), other(x))
