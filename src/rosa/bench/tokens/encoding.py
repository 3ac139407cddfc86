"""Token ids and labels of one row: a text, a prompt with a completion, a chat, or two answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError  # comes with torch

from rosa.bench.tasks.task import MESSAGES
from rosa.bench.tasks.templates import learned_template
from rosa.errors import UserError

Encoded = tuple[list[int], list[int]]
"""Token ids and labels of a whole text; a label of -100 is left out of the loss."""


def encode_text(tokenizer: Any, row: dict[str, str]) -> Encoded:
    """A text, or a prompt with a completion, of which the completion alone is learned."""
    prompt, text = row.get("prompt", ""), row.get("text", row.get("completion", ""))
    if prompt and not prompt[-1].isspace() and not text[:1].isspace():
        text = " " + text
    before = tokenizer(prompt)["input_ids"] if prompt else []
    if before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]
    after = tokenizer(text, add_special_tokens=not before)["input_ids"]
    if not after or after[-1] != tokenizer.eos_token_id:
        after = [*after, tokenizer.eos_token_id]
    return [*before, *after], [*[-100] * len(before), *after]


def chat_encoder(tokenizer: Any, loss_on: str) -> Callable[[dict[str, Any]], Encoded]:
    """What makes tokens of a chat, by its template."""
    template, answers = learned_template(tokenizer, loss_on), loss_on == "answers"

    def encode(row: dict[str, Any]) -> Encoded:
        how = {"chat_template": template, "return_assistant_tokens_mask": answers}
        found = _by_template(tokenizer, row, row[MESSAGES], **how)
        ids = found["input_ids"]
        learned = found["assistant_masks"] if answers else [1] * len(ids)
        return ids, [i if own else -100 for i, own in zip(ids, learned, strict=True)]

    return encode


def pair_of_texts(tokenizer: Any, row: dict[str, Any], answer: str) -> Encoded:
    """A prompt's ids, and those of an answer."""
    ids, labels = encode_text(tokenizer, {"prompt": row["prompt"], "completion": answer})
    start = sum(label == -100 for label in labels)
    return ids[:start], ids[start:]


def pair_of_chats(tokenizer: Any, row: dict[str, Any], answer: list[dict[str, str]]) -> Encoded:
    """A prompt's ids, and those of an answer, by the chats' template."""
    asked = _by_template(tokenizer, row, row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = _by_template(tokenizer, row, row["prompt"] + answer)["input_ids"]
    start = next(
        (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b),
        min(len(asked), len(whole)),
    )
    return whole[:start], whole[start:]


def _by_template(tokenizer: Any, row: dict[str, Any], messages: Any, **how: Any) -> Any:
    """What a tokenizer makes of messages by its template; if it cannot, the row is named."""
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **how)
    except TemplateError as error:
        raise UserError(
            f"the chat template cannot take the chat in row {row['row']}: {error}"
        ) from error
