"""ROSA together with what else PEFT's users train or save memory by."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rosa import RosaCallback, RosaConfig, export_lora, export_merged, export_rosa, resample
from rosa.export.lazily import mapped_lazily
from rosa.export.merged import write_plain
from tests.helpers import moved

X = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attention_bias=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def attach(base: Any, **options: Any) -> Any:
    how = {"r": 2, "target_modules": "all-linear", "directions": "orthonormal", **options}
    return get_peft_model(copy.deepcopy(base), RosaConfig(**how)).eval()


def drawn_again(model: Any, rounds: int = 3) -> torch.Tensor:
    for _ in range(rounds):
        moved(model)
        resample(model)
    moved(model)
    return model(X).logits


def close(model: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(model.eval()(X).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[1, 3, 29], {"embed_tokens": [5]}])
class TestTrainedTokens:
    def test_they_are_saved_loaded_disabled_and_merged(self, tied, tokens, tmp_path):
        base = llama(tied)
        pretrained = base(X).logits
        model = attach(base, trainable_token_indices=tokens)
        close(model, pretrained)
        rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
        before = rows.clone()
        expected = drawn_again(model)
        assert (rows - before).abs().min() > 0
        assert (expected - pretrained).abs().max() > 0.1
        model.save_pretrained(tmp_path)
        for low in (False, True):
            fresh = copy.deepcopy(base)
            close(PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low), expected)
        with model.disable_adapter():
            close(model, pretrained)
        other = RosaConfig(r=2, target_modules="all-linear", trainable_token_indices=tokens)
        model.add_adapter("other", other)
        model.set_adapter("other")
        close(model, pretrained)
        with pytest.raises(ValueError, match="trains modules or tokens besides"):
            model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
        model.set_adapter("default")
        close(model, expected)
        close(model.merge_and_unload(), expected)

    def test_every_export_has_them(self, tied, tokens, tmp_path):
        base = llama(tied)
        model = attach(base, trainable_token_indices=tokens, bias="all")
        expected = drawn_again(model)
        export_lora(model, tmp_path / "lora")
        export_rosa(model, tmp_path / "rosa")
        for name in ("lora", "rosa"):
            close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name), expected)
        export_merged(model, tmp_path / "merged")
        close(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), expected)
        model.save_pretrained(tmp_path / "own")
        (tmp_path / "lazily").mkdir()
        write_plain(*mapped_lazily(base, tmp_path / "own"), tmp_path / "lazily")
        close(LlamaForCausalLM.from_pretrained(tmp_path / "lazily"), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [1, 30]}, "has 30 rows, and none for token 30"),
        ({"trainable_token_indices": {"lm_head": [1]}, "target_modules": ["lm_head"]}, "as well"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "adapted as well"),
        ({"trainable_token_indices": {"wte": [1]}}, "no embedding 'wte'"),
        ({"trainable_token_indices": [1, 1]}, "twice"),
        ({"trainable_token_indices": [-1]}, "must be a list of tokens' numbers"),
        ({"trainable_token_indices": 4}, "must be a list of tokens' numbers"),
    ],
)
def test_tokens_that_cannot_be_trained_are_refused_before_anything_changes(options, message):
    base = llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(base, RosaConfig(**{"target_modules": ["q_proj"], **options}))
    assert [name for name, _ in base.named_modules()] == names


class Headed(nn.Module):
    """A decoder with further modules: a norm, an embedding, a list, a head of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = llama()
        self.kinds = nn.Embedding(4, 30)
        self.norm = nn.LayerNorm(30)
        self.tower = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 30)))
        self.parts = nn.ModuleList([nn.Linear(30, 30), nn.Linear(30, 30)])

    def forward(self, ids: torch.Tensor) -> Any:
        found = self.body(ids)
        x = self.norm(found.logits) + self.kinds(ids % 4)
        x = self.tower(x)
        found.logits = self.parts[1](self.parts[0](x))
        return found


@pytest.mark.parametrize(
    "modules",
    [["norm"], ["kinds"], ["tower"], ["parts.0"], ["norm", "kinds", "tower", "parts.1"]],
)
def test_modules_of_every_shape_train_in_full_beside_it(modules, tmp_path):
    base = Headed().eval()
    model = attach(base, target_modules=["q_proj", "down_proj"], modules_to_save=modules)
    close(model, base(X).logits)
    expected = drawn_again(model)
    model.save_pretrained(tmp_path / "own")
    close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own"), expected)
    export_lora(model, tmp_path / "lora")
    close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora"), expected)
    with model.disable_adapter():
        close(model, base(X).logits)
    close(model, expected)
    plain = model.merge_and_unload()
    close(plain, expected)
    assert {n for n, _ in plain.named_modules()} == {n for n, _ in base.named_modules()}


@pytest.mark.parametrize("trained", ["both", "B"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_training_with_gradient_checkpointing_is_the_training_without(
    reentrant, trained, tmp_path
):
    base = llama()
    data = Dataset.from_dict({"input_ids": X.tolist() * 4, "labels": X.tolist() * 4})
    learned = []
    for checkpointing in (False, True):
        model = attach(
            base, directions="gradient", trained=trained, trainable_token_indices=[1, 3]
        ).train()
        # As PEFT's LoRA+ has them: the factors' second half and the tokens at rates of their own.
        fast = [p for n, p in model.named_parameters() if "rosa_B" in n and p.requires_grad]
        rest = [p for n, p in model.named_parameters() if "rosa_B" not in n and p.requires_grad]
        groups = [{"params": fast, "lr": 4e-2}, {"params": rest, "lr": 1e-2}]
        args = TrainingArguments(
            str(tmp_path / str(checkpointing)),
            max_steps=12,
            per_device_train_batch_size=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=data,
            optimizers=(torch.optim.AdamW(groups), None),  # type: ignore[arg-type]
            callbacks=[RosaCallback(every=4)],
        )
        trainer.train()
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.adapters["default"].draws >= 2
        learned.append(model.eval()(X).logits)
    assert (learned[0] - base(X).logits).abs().max() > 0.1
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "magnitude_prune", "ties_svd"])
def test_exported_adapters_are_merged_by_lora_s_ways(how, tmp_path):
    base = llama()
    for name in ("one", "two"):
        model = attach(base, seed=len(name), target_modules=["q_proj", "down_proj"])
        drawn_again(model, 2)
        options: Any = {} if how.endswith("svd") else {"rank": 6, "uniform_rank": True}
        export_lora(model, tmp_path / name, **options)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two")
    density = {} if how == "linear" else {"density": 0.5}
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type=how, **density)
    found = []
    for name in ("one", "two", "sum"):
        model.set_adapter(name)
        found.append(model.eval()(X).logits)
    assert (found[2] - found[0]).abs().max() > 1e-3
    assert (found[2] - base(X).logits).abs().max() > 1e-3
    assert found[2].isfinite().all()
