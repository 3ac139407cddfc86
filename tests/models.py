"""Tiny random models for unit tests: right for the code's paths, wrong for any claim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from rosa.bench.setup.methods import check_packages
from rosa.errors import UserError


class Mlp(nn.Module):
    """Two linear layers and a Conv1D between them; in 7, out 3; float64 unless told."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(7, 10)
        self.middle = Conv1D(6, 10)
        self.last = nn.Linear(6, 3)
        with torch.no_grad():
            self.middle.weight.normal_(0, 0.3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


EXPERTS, OUT, IN = 4, 10, 6


class Experts(nn.Module):
    """Experts of which each token takes one, and a gate that is a plain matrix."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (EXPERTS, IN, OUT) if is_transposed else (EXPERTS, OUT, IN)
        self.up = nn.Parameter(torch.randn(shape, dtype=torch.float64) / 3)
        self.mix = nn.Parameter(torch.randn(IN, OUT, dtype=torch.float64) / 3)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        up = self.up.mT if self.is_transposed else self.up
        return torch.tanh(torch.einsum("toi,ti->to", up[chosen], x)) @ self.mix.T


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(is_transposed)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return x + self.experts(x, chosen)


def tiny_bert(labels: int = 2, width: int = 16) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def tiny_gpt2(tied: bool = True) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return GPT2LMHeadModel(config)


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "good", "bad", "fine", "poor", "film", "book", "was", "very", "the", "a"]


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """Save a tiny model with a tokenizer of the few WORDS, as a pretrained model's folder."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def needs_packages(method: str) -> None:
    """Skip the test if the method's packages, which are an extra's, are not installed."""
    try:
        check_packages(method)
    except UserError as error:
        pytest.skip(str(error))
