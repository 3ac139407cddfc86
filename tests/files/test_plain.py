"""Adapters on a plain transformers model, by its own `load_adapter` and `from_pretrained`."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from rosa import RosaConfig, export_merged, resample
from rosa.layers.in_model import rosa_layers
from tests.models import save_with_tokenizer, tiny_bert, tiny_gpt2, tiny_llama

IDS = torch.randint(5, 30, (2, 6))


def tiny_t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))


BUILDS = pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_llama, tiny_t5])
KINDS = {tiny_bert: "SEQ_CLS", tiny_t5: "SEQ_2_SEQ_LM"}


def learned(base, seed=0, **options):
    """With two subspaces behind it, and a trained head, if it has one."""
    config = RosaConfig(**{"r": 2, "target_modules": "all-linear", "seed": seed, **options})
    model = get_peft_model(copy.deepcopy(base), config)
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        resample(model)
    return model.eval()


def logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@BUILDS
@pytest.mark.parametrize("low", [False, True])
def test_a_model_loads_an_adapter_and_stays_of_its_class(tmp_path, build, low):
    base = build().eval().requires_grad_(False)
    plain, kind = copy.deepcopy(base), KINDS.get(build, "CAUSAL_LM")
    one = learned(base, task_type=kind)
    two = learned(base, seed=1, task_type=kind)
    for name, model in (("one", one), ("two", two)):
        model.save_pretrained(str(tmp_path / name))
    found = base.load_adapter(str(tmp_path / "one"), low_cpu_mem_usage=low)
    assert not found.missing_keys
    assert not any(p.requires_grad for p in base.parameters())
    assert type(base) is type(plain)
    close(logits(base), logits(one))
    base.load_adapter(str(tmp_path / "two"), "second")
    base.set_adapter("second")
    close(logits(base), logits(two))
    base.set_adapter("default")
    close(logits(base), logits(one))
    if kind != "SEQ_CLS":  # whose head stays, as with any method of PEFT's
        base.disable_adapters()
        close(logits(base), logits(plain))
        base.enable_adapters()
    base.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "again").eval()
    close(logits(again), logits(one))
    base.delete_adapter("second")
    close(logits(base), logits(one))


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_the_auto_classes_and_pipelines_take_an_adapters_folder(tmp_path, build):
    save_with_tokenizer(build(), tmp_path / "base")
    auto = AutoModelForSequenceClassification if build is tiny_bert else AutoModelForCausalLM
    base = auto.from_pretrained(tmp_path / "base")
    model = learned(base, task_type=KINDS.get(build, "CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "adapter"))
    export_merged(model, tmp_path / "merged")
    close(logits(auto.from_pretrained(tmp_path / "adapter")), logits(model))
    _, told = auto.from_pretrained(tmp_path / "adapter", output_loading_info=True)
    assert not told["missing_keys"]
    task = "text-classification" if build is tiny_bert else "text-generation"
    names = (str(tmp_path / name) for name in ("adapter", "merged"))
    how = {"tokenizer": str(tmp_path / "base"), "device": "cpu"}
    one, two = (pipeline(task, model=name, **how) for name in names)
    more = {} if build is tiny_bert else {"max_new_tokens": 5, "do_sample": False}
    text = "good film"
    found, expected = one(text, **more)[0], two(text, **more)[0]
    if build is tiny_bert:
        assert found.pop("score") == pytest.approx(expected.pop("score"), abs=1e-5)
    assert found == expected


@BUILDS
def test_it_is_trained_on_and_drawn_again(tmp_path, build):
    base = build().requires_grad_(False)
    model = learned(base)
    model.save_pretrained(str(tmp_path))
    base.load_adapter(str(tmp_path), is_trainable=True)
    base.eval()
    assert sum(p.requires_grad for p in base.parameters()) >= 2 * len(list(rosa_layers(base)))
    resample(base)
    close(logits(base), logits(model))


def test_a_state_dict_and_its_config_are_loaded(tmp_path):
    base = tiny_gpt2().eval()
    model = learned(base)
    model.save_pretrained(str(tmp_path))
    for state in (get_peft_model_state_dict(model), load_peft_weights(str(tmp_path), "cpu")):
        plain, config = copy.deepcopy(base), copy.deepcopy(model.peft_config["default"])
        plain.load_adapter(peft_config=config, adapter_state_dict=state)
        close(logits(plain), logits(model))


def test_its_arguments_are_transformers(tmp_path):
    base = tiny_gpt2()
    model = learned(base)
    model.save_pretrained(str(tmp_path / "within"))
    base.transformer.h[0].eval()
    state = load_peft_weights(str(tmp_path / "within"), "cpu")
    for name, how in (
        ("folder", {"adapter_kwargs": {"subfolder": "within"}}),
        ("state", {"adapter_kwargs": {"subfolder": "within"}, "adapter_state_dict": state}),
    ):
        base.load_adapter(str(tmp_path), name, is_trainable=True, local_files_only=True, **how)
    assert base.training
    assert not base.transformer.h[0].training
    for name in ("folder", "state"):
        base.set_adapter(name)
        close(logits(copy.deepcopy(base).eval()), logits(model))
    with pytest.raises(TypeError, match="revision"):
        base.load_adapter(str(tmp_path / "within"), "third", revision="v2")
    assert "third" not in base.peft_config


@pytest.mark.parametrize("fault", ["weights", "config", "tensor", "other base", "name", "hotswap"])
def test_where_it_fails_the_model_is_as_it_was(tmp_path, fault):
    base = tiny_gpt2().eval()
    plain = copy.deepcopy(base)
    learned(base).save_pretrained(str(tmp_path))
    base.add_adapter(RosaConfig(r=2, target_modules=["c_fc"]), "there")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    name, how = "new", {}
    if fault == "weights":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    elif fault == "config":
        (tmp_path / "adapter_config.json").write_text("{")
    elif fault == "tensor":
        other = learned(plain, target_modules=["c_attn"])
        other.save_pretrained(str(tmp_path / "other"))
        (tmp_path / "other" / "adapter_model.safetensors").replace(
            tmp_path / "adapter_model.safetensors"
        )
    elif fault == "other base":
        learned(tiny_llama()).save_pretrained(str(tmp_path))
    elif fault == "name":
        name = "there"
    else:
        how, name = {"hotswap": True}, "there"
    with pytest.raises((ValueError, SafetensorError)):
        base.load_adapter(str(tmp_path), name, **how)
    assert [*base.peft_config] == ["there"]
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_other_methods_are_loaded_as_ever(tmp_path):
    base = tiny_gpt2().eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(str(tmp_path / "lora"))
    learned(base).save_pretrained(str(tmp_path / "rosa"))
    base.load_adapter(str(tmp_path / "lora"))
    close(logits(base), logits(model))
    with pytest.raises(ValueError, match="already carries another PEFT method"):
        base.load_adapter(str(tmp_path / "rosa"), "second")
    assert [*base.peft_config] == ["default"]
