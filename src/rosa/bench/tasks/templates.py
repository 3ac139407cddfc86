"""The template that makes a text of a chat, and tells which of its words are the assistant's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError  # comes with torch

from rosa.bench.processes import say
from rosa.errors import UserError


def check_trl(what: str) -> None:
    """Raise UserError if TRL is not installed, by which `what` is trained."""
    if find_spec("trl") is None:
        raise UserError(f"{what} trains through TRL: run pip install 'rosa-finetune[chat]'")


def give_template(tokenizer: Any, path: Path | None, loss_on: str) -> None:
    """Give the tokenizer the template of a file, if one is named; check that chats can be learned.

    Raises:
        FileNotFoundError, ValueError: there is no template, or none that tells what is learned.
    """
    check_trl("a chat")
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"chat template {path} is not there: check the path")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: it is no chat "
            "model's. Give a file with one by --chat-template"
        )
    try:  # jinja2 compiles it when it is used, and data may not suit it
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        where = path or f"of {tokenizer.name_or_path}"
        raise UserError(
            f"the chat template {where} is no template of Jinja's: line {error.lineno}: {error}"
        ) from error
    except Exception:  # it may want more messages
        pass
    template = learned_template(tokenizer, loss_on)
    if loss_on == "answers":
        from trl.chat_template_utils import is_chat_template_stop_token_trained

        if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
            say(
                "the chat template does not mark the end of an answer as the assistant's: the "
                "model may not learn to stop"
            )


def learned_template(tokenizer: Any, loss_on: str) -> str | None:
    """The template to learn by; None for the tokenizer's own.

    With the loss on the answers it must mark them. TRL has such a form of the templates of many
    models, which makes the same texts.

    Raises:
        ValueError: neither the tokenizer's template marks the answers nor has TRL one for it.
    """
    if loss_on == "all":
        return None
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} is in Python, and cannot tell which tokens are the "
            "assistant's: learn all words by --loss-on all"
        )
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "the chat template does not mark what the assistant says, and TRL knows no form of it "
            "that does: put {% generation %} and {% endgeneration %} around that in a file of it "
            "and give it by --chat-template, or learn all words by --loss-on all"
        ) from error
