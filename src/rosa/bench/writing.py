"""`rosa generate`: what a trained model writes after a prompt, or answers in a chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError  # comes with torch
from transformers import GenerationConfig, TextStreamer, set_seed

from rosa.bench.storage import models
from rosa.bench.tasks.chat import holds_chats, read_prompts
from rosa.bench.tasks.files import read_columns
from rosa.bench.tokens.reading import longest_input
from rosa.errors import UserError

Prompt = str | list[dict[str, str]]
"""A text to go on with, or a chat's messages to answer."""


@dataclass(frozen=True)
class Sampling:
    """How words are chosen: the likeliest at a temperature of 0, else by chance.

    Attributes:
        max_new_tokens: the most that are written.
        temperature: above 1 more surprising, below 1 less.
        top_p: only the likeliest words that have so much of the chance together.
        seed: of the chance.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise UserError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")


class Writer:
    """A trained decoder that writes.

    Args:
        folder: a run's folder, an adapter's, or a plain model's.
        model: the base model of an adapter; None takes the one that it names.
        sampling: how words are chosen.

    Raises:
        FileNotFoundError, ValueError: the folder holds no decoder with its tokenizer.
    """

    def __init__(self, folder: Path, model: str | None, sampling: Sampling) -> None:
        trained, tokenizer = models.load_trained(folder, model)
        if not trained.can_generate():
            raise UserError(f"{folder} holds a model that writes no text, as a classifier")
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer: save it beside the model")
        self.folder = folder
        self.tokenizer: Any = tokenizer
        device = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        self.model: Any = trained if device is None else trained.to(device)  # type: ignore[arg-type]
        self.reads = longest_input(trained) or 2**30
        self.sampling = sampling
        set_seed(sampling.seed)

    def write(self, prompt: Prompt, streamer: TextStreamer | None = None) -> str:
        """What the model writes after a prompt, or as the next message of a chat.

        Raises:
            ValueError: the prompt is too long, or a chat and the tokenizer has no template for it.
        """
        inputs = self._inputs(prompt)
        length = inputs["input_ids"].shape[1]
        room = self.reads - length
        with torch.no_grad():
            found = self.model.generate(
                **inputs, generation_config=self._config(room), streamer=streamer
            )
        return self.tokenizer.decode(found[0, length:], skip_special_tokens=True)

    def check(self, path: Path, prompts: list[Prompt]) -> None:
        """Raise UserError, which names the row of the file, if one cannot be gone on with."""
        for row, prompt in enumerate(prompts, start=1):
            try:
                self._inputs(prompt)
            except UserError as error:
                raise UserError(f"{path}: row {row}: {error}") from error

    def check_chats(self) -> None:
        """Raise UserError if the tokenizer makes no texts of chats."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.folder} has no chat template: give a --prompt, which is "
                "gone on with as it stands"
            )

    def streamer(self) -> TextStreamer:
        """What prints the words as they come."""
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def _inputs(self, prompt: Prompt) -> dict[str, Any]:
        if isinstance(prompt, str):
            found = self.tokenizer(prompt, return_tensors="pt")
            found = {n: v for n, v in found.items() if n in ("input_ids", "attention_mask")}
            if found["input_ids"].shape[1] == 0:
                raise UserError("the prompt has no words")
        else:
            self.check_chats()
            try:
                found = self.tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            except TemplateError as error:
                raise UserError(f"the chat template cannot take these messages: {error}") from error
        length = found["input_ids"].shape[1]
        if length >= self.reads:
            raise UserError(f"the prompt has {length} tokens, the model reads {self.reads} in all")
        return {n: v.to(self.model.device) for n, v in found.items()}

    def _config(self, room: int) -> GenerationConfig:
        """The model's own, which knows the words that end a text, with the sampling asked for."""
        config = GenerationConfig.from_dict(self.model.generation_config.to_dict())
        own = config.eos_token_id or []
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        known = {n for n in ends if n < self.model.config.get_text_config().vocab_size}
        chance: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if self.sampling.temperature > 0:
            chance = {"do_sample": True, "temperature": self.sampling.temperature}
            chance["top_p"] = self.sampling.top_p
        config.update(
            max_new_tokens=min(self.sampling.max_new_tokens, room),
            max_length=None,
            eos_token_id=sorted(known) or None,
            pad_token_id=self.tokenizer.pad_token_id or next(iter(known), 0),
            top_k=None,
            **chance,
        )
        return config


def prompts_of(path: Path) -> list[Prompt]:
    """The prompts of a file: a line each of text, `prompt` of JSON lines or tables, or `messages`.

    Raises:
        FileNotFoundError, ValueError: see `read_columns`; also if a row has none.
    """
    if holds_chats(path):
        return [*read_prompts(path)]
    if path.suffix.lower() == ".txt":
        found: list[Any] = [
            x for x in "\n".join(read_columns(path)["text"]).split("\n") if x.strip()
        ]
    else:
        columns = read_columns(path)
        found = columns.get("prompt") or columns.get("text") or []
        if not found:
            raise UserError(f"{path} has no column prompt, text or messages")
    for row, prompt in enumerate(found, start=1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{path}: row {row} has no prompt")
    return found


def answers(
    writer: Writer, said: Iterable[str], streamer: TextStreamer, system: str | None = None
) -> Iterator[str]:
    """A chat: what the model answers to what is said, each time with all that was said before.

    Args:
        writer: of the answers.
        said: by the user.
        streamer: is given the words.
        system: the system's message before all others, if there is one.
    """
    writer.check_chats()
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text in said:
        messages.append({"role": "user", "content": text})
        answer = writer.write(messages, streamer)
        messages.append({"role": "assistant", "content": answer})
        yield answer
