"""Models with adapted layers of every kind: what is adapted of each, and what it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from tests.models import tiny_bert, tiny_gpt2

Target = tuple[nn.Module, dict[str, list[str]]]


class Padded(nn.Conv2d):
    """A convolution that pads its inputs itself, as image models have them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Gated(nn.Module):
    """A weight of its own between modules inside, as of a mixture's experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width, width) / 3)
        self.act, self.norm = nn.SiLU(), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x) @ self.gate)


class Pictures(nn.Module):
    """Convolutions, one of them in groups and one padded, and torch's attention over places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.third = Padded(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gated = Gated(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(F.relu(self.first(x)))).flatten(2).transpose(1, 2)
        return self.last(self.gated(x + self.attention(x, x, x)[0]))


def bert() -> Target:
    return tiny_bert(), {"target_modules": ["query", "dense", "word_embeddings"]}


def gpt2() -> Target:
    return tiny_gpt2(tied=False), {"target_modules": ["c_attn", "c_proj", "wte", "lm_head"]}


def pictures() -> Target:
    names = ["first", "second", "third", "attention", "last"]
    return Pictures(), {"target_modules": names, "target_parameters": ["gated.gate"]}


def experts() -> Target:
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"  # which takes float64
    names = ["experts.gate_up_proj", "experts.down_proj"]
    return MixtralForCausalLM(config), {"target_modules": ["q_proj"], "target_parameters": names}


KINDS = {"bert": bert, "gpt2": gpt2, "pictures": pictures, "experts": experts}


def inputs_of(kind: str, dtype: torch.dtype | None) -> Tensor:
    """Twelve rows for a model of the kind."""
    if kind == "pictures":
        return torch.randn(12, 3, 6, 6, dtype=dtype)
    return torch.randint(50, (12, 5))


def outputs(model: Any, x: Tensor) -> Tensor:
    """What a model makes of them."""
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits
