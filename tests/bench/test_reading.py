"""How many tokens a model reads: found in the model, and held against really reading so many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from rosa import RosaConfig
from rosa.bench.tokens.reading import longest_input
from tests.models import tiny_bert, tiny_gpt2

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
PLACES = {**SMALL, "max_position_embeddings": 40}
SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
BART = {
    **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in SIZES.items()},
    "vocab_size": 60,
    "d_model": 16,
    "max_position_embeddings": 40,
}
GPT = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
SEQ = "ForSequenceClassification"
# Class, configuration, how many tokens it reads, and whether one more fails.
MODELS: dict[str, tuple[str, dict[str, Any], int | None, bool]] = {
    "Bert": (SEQ, PLACES, 40, True),
    "Roberta": (SEQ, {**PLACES, "pad_token_id": 1}, 38, True),
    "Roberta padded by 5": (
        "RobertaForSequenceClassification",
        {**PLACES, "pad_token_id": 5},
        34,
        True,
    ),
    "XLMRoberta": (SEQ, PLACES, 38, True),
    "XLMRobertaXL": (SEQ, PLACES, 38, True),
    "Camembert": (SEQ, PLACES, 38, True),
    "Data2VecText": (SEQ, PLACES, 38, True),
    "RobertaPreLayerNorm": (SEQ, PLACES, 38, True),
    "Xmod": (SEQ, {**PLACES, "languages": ["en_XX"], "default_language": "en_XX"}, 38, True),
    "IBert": (SEQ, PLACES, 38, True),
    "MPNet": (SEQ, PLACES, 38, True),
    "Esm": (SEQ, {**PLACES, "pad_token_id": 1, "position_embedding_type": "absolute"}, 38, True),
    "Longformer": (SEQ, {**PLACES, "max_position_embeddings": 66, "attention_window": 8}, 64, True),
    "BigBird": (SEQ, PLACES, 40, True),
    "Electra": (SEQ, {**PLACES, "embedding_size": 16}, 40, True),
    "Albert": (SEQ, {**PLACES, "embedding_size": 16}, 40, True),
    "DistilBert": (
        SEQ,
        {
            "vocab_size": 60,
            "dim": 16,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 40,
        },
        40,
        True,
    ),
    "Deberta": (SEQ, PLACES, 40, True),
    "DebertaV2": (SEQ, PLACES, 40, True),
    "Canine": (SEQ, {**PLACES, "max_position_embeddings": 128}, 128, True),
    "OPT": (
        "ForCausalLM",
        {**SMALL, "ffn_dim": 24, "max_position_embeddings": 40, "word_embed_proj_dim": 16},
        40,
        True,
    ),
    "Bart": (SEQ, BART, 40, True),
    "MBart": (SEQ, BART, 40, True),
    "BioGpt": ("ForCausalLM", PLACES, 40, True),
    "GPT2": ("LMHeadModel", GPT, 40, True),
    "OpenAIGPT": ("LMHeadModel", GPT, 40, True),
    "GPTNeo": (
        "ForCausalLM",
        {
            "vocab_size": 60,
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "attention_types": [[["global"], 1]],
            "max_position_embeddings": 40,
        },
        40,
        True,
    ),
    "GPTBigCode": ("ForCausalLM", GPT, 40, True),
    "GPTJ": ("ForCausalLM", {**GPT, "rotary_dim": 4}, 40, True),
    "CTRL": ("LMHeadModel", {**GPT, "dff": 24}, 40, True),
    "XLM": (
        SEQ,
        {
            "vocab_size": 60,
            "emb_dim": 16,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": 40,
        },
        40,
        True,
    ),
    "Llama": ("ForCausalLM", PLACES, 40, False),
    "Esm, rotary": (
        "EsmForSequenceClassification",
        {**PLACES, "pad_token_id": 1, "position_embedding_type": "rotary"},
        40,
        False,
    ),
    "DebertaV2, relative": (
        "DebertaV2ForSequenceClassification",
        {**PLACES, "position_biased_input": False, "relative_attention": True},
        40,
        False,
    ),
    "Bloom": (
        "ForCausalLM",
        {"vocab_size": 60, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        None,
        False,
    ),
    "XLNet": (
        SEQ,
        {"vocab_size": 60, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
        None,
        False,
    ),
    "T5": (
        SEQ,
        {
            "vocab_size": 60,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        None,
        False,
    ),
    "Mamba": (
        "ForCausalLM",
        {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
        None,
        False,
    ),
}


def build(name: str) -> nn.Module:
    ending, settings, _, _ = MODELS[name]
    name = ending.removesuffix(SEQ) if ending.endswith(SEQ) and ending != SEQ else name
    config = getattr(transformers, f"{name}Config")(**settings)
    config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    return getattr(transformers, f"{name}{ending.removeprefix(name)}")(config).eval()


def read(model: Any, length: int) -> torch.Tensor:
    """The logits on so many tokens, of which none is special and the last ends the text."""
    ids = torch.randint(10, 50, (2, length))
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_as_much_as_is_found_and_no_more(name):
    model, (_, _, expected, hard) = build(name), MODELS[name]
    found = longest_input(model)
    assert found == expected
    assert read(model, found or 100).isfinite().all()
    if hard:
        with pytest.raises((IndexError, RuntimeError)):
            read(model, found + 1)


def test_finding_it_leaves_the_model_alone():
    model = build("BigBird")  # short texts make it change its attention for good
    kind, keys = model.bert.attention_type, list(model.state_dict())
    longest_input(model)
    assert model.bert.attention_type == kind == "block_sparse"
    assert list(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert build("Roberta").training is False


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (RosaConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"), 0),
        (LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"), 0),
        (PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), 5),
        (PrefixTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM"), 7),
    ],
)
def test_what_stands_before_a_text_takes_its_places(config, taken):
    model = get_peft_model(tiny_gpt2(), config).eval()
    found = longest_input(model)
    assert found == 32 - taken
    read(model, found)
    with pytest.raises((IndexError, RuntimeError)):
        read(model, found + 1)


def test_a_model_that_wants_other_inputs_is_taken_at_its_configs_word():
    class Picky(type(tiny_bert())):
        def forward(self, *args, **kwargs):
            raise ValueError("no")

    assert longest_input(Picky(tiny_bert().config)) == 32
