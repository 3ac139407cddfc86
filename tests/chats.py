"""Tiny chats, and a model with a template for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from tests.models import WORDS, save_with_tokenizer, tiny_gpt2

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}the "
    "{% generation %}{{ m['content'] }}[SEP]{% endgeneration %} "
    "{% else %}a {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}the {% endif %}"
)
"""A template that marks what the assistant says and the end of it."""
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def words(most: int, least: int = 1) -> str:
    return " ".join(random.choices(WORDS[4:], k=random.randint(least, most)))


def chat(turns: int = 1, most: int = 4) -> dict[str, Any]:
    """Questions of some words with answers of some words."""
    roles = ["user", "assistant"] * turns
    return {"messages": [{"role": role, "content": words(most)} for role in roles]}


def write_chats(path: Path, rows: list[dict[str, Any]] | int = 40) -> Path:
    rows = [chat(1 + i % 2) for i in range(rows)] if isinstance(rows, int) else rows
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def chat_model(
    folder: Path, template: str | None = MARKED, model: PreTrainedModel | None = None
) -> Path:
    save_with_tokenizer(model or tiny_gpt2(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
