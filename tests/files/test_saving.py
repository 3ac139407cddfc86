"""Files and state dicts: complete, checked, and never silently another model."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rosa import RosaConfig, export_lora, resample
from rosa.layers.in_model import rosa_layers
from tests.models import Mlp, tiny_bert, tiny_gpt2

TARGETS = ["first", "middle", "last"]


def attach(model, **options):
    return get_peft_model(model, RosaConfig(**{"r": 2, "target_modules": TARGETS, **options}))


def learn(model, rounds=3):
    """Change the factors at random, with resamples between; by as much whatever the rounds."""
    size = 0.05 * (3 / max(rounds, 3)) ** 0.5
    for round_ in range(rounds):
        if round_:
            resample(model)
        for name, p in model.named_parameters():
            if "rosa_" in name and p.requires_grad:
                p.data.add_(torch.randn_like(p), alpha=size)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    base = Mlp(torch.float32)
    model = learn(attach(copy.deepcopy(base)))
    x = torch.randn(5, 7)
    model.save_pretrained(str(tmp_path))
    return base, model, x, tmp_path


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_loads_as_it_was_saved(saved, low_memory, trainable):
    base, model, x, folder = saved
    assert {p.name for p in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(
        base, str(folder), is_trainable=trainable, low_cpu_mem_usage=low_memory
    )
    torch.testing.assert_close(loaded.eval()(x), model(x), rtol=0, atol=1e-5)
    # And it goes on alike: the next subspaces are those that would have been drawn.
    resample(model)
    resample(loaded)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-5)
    for (_, one), (_, two) in zip(rosa_layers(model), rosa_layers(loaded), strict=True):
        assert one.adapters["default"].draws == two.adapters["default"].draws == 4
        product = one.adapters["default"].learned().dense()
        torch.testing.assert_close(
            two.adapters["default"].learned().dense(), product, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_loaded_is_not_rounded_to_the_weights_precision(
    tmp_path, dtype, low_memory, autocast
):
    base, x = Mlp(dtype), torch.randn(5, 7, dtype=dtype)
    how: Any = {"autocast_adapter_dtype": autocast}
    config = RosaConfig(r=2, target_modules=TARGETS)
    model = learn(get_peft_model(copy.deepcopy(base), config, **how))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_memory, **how)
    for (_, one), (_, two) in zip(rosa_layers(model), rosa_layers(loaded), strict=True):
        expected, found = (layer.whole_change("default").dense() for layer in (one, two))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded.eval()(x), model(x))


@pytest.mark.parametrize("rounds", [1, 40])
@pytest.mark.parametrize("build", [tiny_bert, lambda: tiny_gpt2(tied=True)])
def test_logits_agree_after_any_number_of_resamples(tmp_path, build, rounds):
    base = build().eval()
    kind = "SEQ_CLS" if hasattr(base, "classifier") else "CAUSAL_LM"
    model = copy.deepcopy(base)
    config = RosaConfig(r=2, target_modules="all-linear", task_type=kind)
    model = learn(get_peft_model(model, config), rounds)
    model.save_pretrained(str(tmp_path))
    ids = torch.randint(50, (3, 9))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    expected = model(ids).logits
    assert (expected - base(ids).logits).abs().max() > 0.01
    # The worst of 150 was 7e-6.
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("state", ["plain", "merged", "disabled"])
def test_saving_in_any_state_saves_the_same(saved, tmp_path_factory, state):
    _, model, _, folder = saved
    other = tmp_path_factory.mktemp(state)
    if state == "merged":
        model.merge_adapter()
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    model.save_pretrained(str(other))
    one, two = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    first, second = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, other))
    assert first["base_fingerprint"] == second["base_fingerprint"]


def test_the_file_holds_everything_and_nothing_of_the_base(saved):
    *_, folder = saved
    keys = load_file(folder / "adapter_model.safetensors").keys()
    parts = ["rosa_A", "rosa_B", "rosa_offset.A", "rosa_offset.B", "rosa_offset.draws"]
    assert keys == {f"base_model.model.{m}.{p}" for m in TARGETS for p in parts}


def test_two_adapters_switch_and_disable_without_garbage(tmp_path):
    """huggingface/peft #2184: methods that change the base weights, loaded side by side."""
    base, x = Mlp(torch.float32), torch.randn(5, 7)
    outputs = {}
    for name, directions in (("one", "svd"), ("two", "orthonormal")):
        model = learn(attach(copy.deepcopy(base), directions=directions))
        outputs[name] = model(x)
        model.save_pretrained(str(tmp_path / name))
    pretrained = copy.deepcopy(base)
    model = PeftModel.from_pretrained(base, str(tmp_path / "one"), adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    for name in ("one", "two", "one", "two", "two", "one"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), outputs[name], rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            disabled = model(x)
        torch.testing.assert_close(model(x), outputs[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(disabled, pretrained(x), rtol=1e-5, atol=1e-5)


def test_loading_over_an_adapter_replaces_it_even_if_merged(saved):
    base, model, x, folder = saved
    expected = model(x)
    other = learn(attach(copy.deepcopy(base), seed=9))
    other.merge_adapter()
    other.load_adapter(str(folder), "default")
    torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)
    other.unmerge_adapter()
    torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)
    with other.disable_adapter():
        torch.testing.assert_close(other(x), base(x), rtol=1e-5, atol=1e-5)


def test_another_base_is_warned_of_with_its_layers(saved):
    base, _, _, folder = saved
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.middle.weight.add_(0.1)
    with pytest.warns(UserWarning, match=r"other base weights: 1 of 3 layers differ .*middle"):
        PeftModel.from_pretrained(other, str(folder))
    for same in (base, copy.deepcopy(base).bfloat16(), copy.deepcopy(base).half()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PeftModel.from_pretrained(same, str(folder))


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def without(part):
    def change(state):
        for key in [k for k in state if part in k]:
            del state[key]

    return change


def spoil(state):
    state["base_model.model.first.rosa_B"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("rosa_offset"), "does not fit this model: it lacks 9 tensors"),
        (without("first"), "it lacks 5 tensors, such as base_model.model.first"),
        (spoil, r"in 1 of 3 layers: .*first: NaN or infinity"),
    ],
)
def test_an_incomplete_or_broken_file_is_refused_and_changes_nothing(saved, change, message):
    base, _, x, folder = saved
    expected = base(x)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, str(folder))
    torch.testing.assert_close(base(x), expected)
    other = learn(attach(copy.deepcopy(base)))
    before = other(x)
    with pytest.raises(ValueError, match=message):
        other.load_adapter(str(folder), "default")
    torch.testing.assert_close(other(x), before)


def test_a_truncated_file_is_refused(saved):
    base, _, x, folder = saved
    expected = base(x)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(base, str(folder))
    torch.testing.assert_close(base(x), expected)


def test_the_file_of_another_method_is_refused(saved, tmp_path_factory):
    base, _, _, folder = saved
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=TARGETS))
    other = tmp_path_factory.mktemp("lora")
    lora.save_pretrained(str(other))
    (other / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=r"not a ROSA adapter: its file holds no rosa_ weights"):
        PeftModel.from_pretrained(base, str(other))


def test_shapes_that_do_not_fit_are_named(saved):
    base, _, _, folder = saved
    config = RosaConfig.from_pretrained(str(folder))
    config.r = 3
    with pytest.raises(ValueError, match=r"first: file A \(2, 7\), B \(10, 2\), model A \(3, 7\)"):
        PeftModel.from_pretrained(base, str(folder), config=config)


# Settings that there were, by versions before this one.
GONE = {
    "triplets": "gradient",
    "split": "B",
    "informed": 0.5,
    "temperature": 1.0,
    "allocate": True,
}


def test_an_adapter_with_settings_that_are_no_more_loads_with_one_warning(tmp_path):
    """Also one whose ranks were moved by its draws, which its `rank_pattern` has noted."""
    base, x = Mlp(torch.float32), torch.randn(5, 7)
    model = learn(attach(copy.deepcopy(base), rank_pattern={"^first": 3, "^last": 1}))
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **GONE}))
    with pytest.warns(UserWarning, match=re.escape(f"arguments {sorted(GONE)}")) as found:
        loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert len(found) == 1
    assert [layer.adapters["default"].r for _, layer in rosa_layers(loaded)] == [3, 2, 1]
    torch.testing.assert_close(loaded(x), model(x))
    with pytest.warns(UserWarning, match="these are ignored"):
        config = RosaConfig.from_pretrained(str(tmp_path))
    assert not GONE.keys() & config.to_dict().keys()


OLD = Path(__file__).parent / "data" / "adapter-of-0.1"
"""An adapter of three draws as version 0.1 saved it on November 26th, 2026 (commit 84c7536)."""


def old_base() -> nn.Module:
    """The model that `OLD` belongs to."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.arange(weight.numel()).reshape(weight.shape).mul(0.7).sin())
    return model


def test_an_adapter_of_an_older_version_loads_and_computes_what_it_did(tmp_path):
    expected = load_file(OLD / "expected.safetensors")
    with pytest.warns(UserWarning, match="these are ignored"):
        model = PeftModel.from_pretrained(old_base(), str(OLD), is_trainable=True)
    torch.testing.assert_close(model(expected["inputs"]), expected["outputs"])
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(old_base(), str(tmp_path))
    torch.testing.assert_close(again(expected["inputs"]), expected["outputs"])
    learn(model)
    assert not torch.allclose(model(expected["inputs"]), expected["outputs"])


def test_no_pickle_is_saved(tmp_path):
    """What would not be loaded again; PEFT's other methods save as they did."""
    for config, is_ours in ((RosaConfig, True), (LoraConfig, False)):
        model = get_peft_model(Mlp(), config(r=2, target_modules=["first"]))
        folder = tmp_path / config.__name__
        if is_ours:
            with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
                model.save_pretrained(str(folder), safe_serialization=False)
            assert not folder.exists()
        else:
            model.save_pretrained(str(folder), False)
            assert (folder / "adapter_model.bin").is_file()


def test_a_state_dict_without_offsets_is_not_saved(saved, tmp_path_factory):
    _, model, _, _ = saved
    partial = {k: v for k, v in model.state_dict().items() if "rosa_offset" not in k}
    with pytest.raises(ValueError, match="factors without their offsets"):
        model.save_pretrained(str(tmp_path_factory.mktemp("partial")), state_dict=partial)


def test_state_dicts_of_the_base_model_are_the_pretrained_weights():
    base = Mlp()
    weights = copy.deepcopy(base.state_dict())
    model = learn(attach(base))
    found = get_base_model_state_dict(model)
    assert found.keys() == weights.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, weights[name])


def test_modules_to_save_and_biases_travel_with_the_adapter(tmp_path):
    base, x = Mlp(torch.float32), torch.randn(5, 7)
    model = attach(
        copy.deepcopy(base), target_modules=["first"], modules_to_save=["last"], bias="rosa_only"
    )
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to_lora", [False, True])
def test_an_adapted_output_embedding_is_saved_without_its_offset(tmp_path, to_lora):
    base, ids = tiny_gpt2(tied=False).eval(), torch.randint(50, (2, 6))
    options = {"target_modules": ["lm_head", "c_fc"], "task_type": "CAUSAL_LM"}
    model = learn(attach(copy.deepcopy(base), **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the embeddings
        (export_lora(model, tmp_path) if to_lora else model.save_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_adapter_is_in_memory_what_its_file_says(tmp_path, dtype):
    base = Mlp(dtype)
    model = learn(attach(copy.deepcopy(base)), rounds=6)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    for (_, layer), (_, other) in zip(rosa_layers(model), rosa_layers(loaded), strict=True):
        assert torch.equal(layer.weight, other.weight)


def test_another_fine_tuning_of_a_half_precision_base_is_noticed(tmp_path):
    base = Mlp(torch.bfloat16)
    learn(attach(copy.deepcopy(base))).save_pretrained(str(tmp_path))
    with torch.no_grad():
        base.first.weight.mul_(1 + 2**-7)
    with pytest.warns(UserWarning, match=r"1 of 3 layers differ \(first\)"):
        PeftModel.from_pretrained(base, str(tmp_path))


def test_low_level_state_dicts_round_trip():
    base, x = Mlp(), torch.randn(5, 7).double()
    model = learn(attach(copy.deepcopy(base)))
    other = attach(copy.deepcopy(base), seed=4)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    torch.testing.assert_close(other(x), model(x))


def test_a_head_whose_name_begins_like_a_factor_travels_too():
    class Headed(Mlp):
        def __init__(self):
            super().__init__()
            self.rosa_head = self.last

        def forward(self, x):
            return self.rosa_head(torch.tanh(self.middle(torch.tanh(self.first(x)))))

    base, x = Headed(), torch.randn(4, 7).double()
    del base.last
    options = {"target_modules": ["first"], "modules_to_save": ["rosa_head"]}
    model, other = attach(copy.deepcopy(base), **options), attach(base, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.1)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    torch.testing.assert_close(other(x), model(x))


def test_two_adapters_of_one_config_draw_different_subspaces():
    config = RosaConfig(r=2, target_modules=["first"])
    model = get_peft_model(Mlp(), config)
    model.add_adapter("second", config)
    (_, layer), *_ = rosa_layers(model)
    assert not torch.allclose(layer.rosa_A["default"], layer.rosa_A["second"])
