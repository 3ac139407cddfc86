"""Names of experts' projections, which transformers keeps in single parameters."""

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rosa import RosaConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BOTH = ["experts.down_proj", "experts.gate_up_proj"]


def qwen3(**more: Any) -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=8, **experts, **more))


def qwen2() -> nn.Module:
    """With a shared expert beside the others, of linear layers."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, **experts, shared_expert_intermediate_size=16)
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (qwen3, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        (qwen3, ["q_proj", "up_proj"]),
        (qwen3, r".*\.(q_proj|gate_proj|up_proj)"),
        (qwen3, r".*experts\.0\.gate_proj|.*q_proj"),
        (mixtral, ["q_proj", "w1", "w2", "w3"]),
        (mixtral, ["w2"]),
    ],
)
def test_experts_that_are_named_as_modules_are_not_left_out_in_silence(make, targets):
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"of the experts.*target_parameters=\['experts\."):
        get_peft_model(model, RosaConfig(target_modules=targets))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("make", [qwen3, mixtral])
def test_experts_are_adapted_as_the_error_says(make):
    model: Any = get_peft_model(
        make(), RosaConfig(target_modules=["q_proj"], target_parameters=BOTH)
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("experts" in name for name in trained) == 8
    assert sum("q_proj" in name for name in trained) == 4


@pytest.mark.parametrize("make", [qwen2, lambda: qwen3(mlp_only_layers=[0])])
def test_other_modules_of_these_names_are_adapted_with_a_warning(make):
    names = ["gate_proj", "up_proj", "down_proj"]
    with pytest.warns(UserWarning, match="of the experts.*only other modules"):
        model: Any = get_peft_model(make(), RosaConfig(target_modules=names))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not any(".experts." in name for name in trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(make(), RosaConfig(target_modules=names, target_parameters=BOTH))


@pytest.mark.parametrize("first", [{}, {"target_parameters": BOTH}])
def test_a_second_adapter_is_told_the_same(first):
    names = ["gate_proj", "up_proj", "down_proj"]
    model: Any = get_peft_model(qwen2(), RosaConfig(target_modules=names, **first))
    with pytest.warns(UserWarning, match="of the experts.*only other modules"):
        model.add_adapter("second", RosaConfig(target_modules=names))
    model: Any = get_peft_model(qwen3(), RosaConfig(target_modules=["q_proj"], **first))
    with pytest.raises(ValueError, match="of the experts"):
        model.add_adapter("second", RosaConfig(target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", RosaConfig(target_modules=["q_proj"], target_parameters=BOTH))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (qwen3, ["q_proj", "v_proj"]),
        (qwen3, "all-linear"),
        (mixtral, r".*self_attn\.(q|v)_proj"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
            ["q_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    ],
)
def test_nothing_is_said_where_no_expert_is_named(make, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(make(), RosaConfig(target_modules=targets))


def test_an_adapter_of_before_is_loaded(tmp_path):
    base = qwen3()
    get_peft_model(base, RosaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"q_proj"', '"q_proj", "up_proj"'))
    for trains in (False, True):
        PeftModel.from_pretrained(qwen3(), str(tmp_path), is_trainable=trains)
