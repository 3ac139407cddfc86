"""What a run needs before anything is written: its task, tokenizer, rows and model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from rosa import map_pretrained
from rosa.bench import tasks
from rosa.bench.processes import join
from rosa.bench.setup.checking import RESAMPLED
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import models
from rosa.bench.tasks.task import DataSettings, Task
from rosa.bench.tasks.templates import give_template
from rosa.bench.tokens.reading import longest_input
from rosa.bench.tokens.tokenizing import tokenize
from rosa.bench.train.building import adapt, load_base
from rosa.bench.train.trainer import collator
from rosa.errors import UserError

FIRST_STEPS = 4
"""Steps' batches that a method sees which begins with the training data's gradient."""


@dataclass(frozen=True)
class Ready:
    """All that a training needs, before anything is written.

    Attributes:
        task, tokenizer: of the run.
        rows: the task's splits as token ids.
        model: as the method trains it.
        recorder: of the change of its weights; None if none is asked for.
        reads: the most tokens that the model reads at once; None if any number.
    """

    task: Task
    tokenizer: Any
    rows: dict[str, Any]
    model: Any
    recorder: Any
    reads: int | None


def prepare(settings: RunSettings) -> Ready:
    """What a run trains and on what; raises as `train` does."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import set_seed

    task = load_task(settings)
    tokenizer = load_tokenizer(settings, task)
    set_seed(settings.seed)
    base = load_base(settings, task, tokenizer.pad_token_id)
    reads = longest_input(base.model)
    if reads is not None:
        reads -= find_method(settings.method).virtual_tokens
    rows = tokenize(settings, task, reads, tokenizer)

    def batches() -> Iterable[dict[str, Any]]:
        order = torch.Generator().manual_seed(settings.seed)
        collate = collator(settings, task, tokenizer)
        size = settings.batch_size
        batches_a_step = settings.gradient_accumulation * join().num_processes
        loader = DataLoader(rows["train"], size, shuffle=True, generator=order, collate_fn=collate)
        return itertools.islice(loader, FIRST_STEPS * batches_a_step)

    model, recorder = adapt(settings, base, batches)
    if settings.method in RESAMPLED and not (settings.deepspeed or settings.fsdp):
        with suppress(UserError):  # then they are copied, or exact to a rounding
            map_pretrained(model)
    return Ready(task, tokenizer, rows, model, recorder, reads)


def load_task(settings: RunSettings) -> Task:
    """The data of a run; raises as `rosa.bench.tasks.load` does."""
    config = models.load_config(settings.model)
    names = [f.name for f in fields(DataSettings)]
    data = DataSettings(**{n: getattr(settings, n) for n in names})
    task = tasks.load(data, models.is_decoder(config))
    if settings.packing and (task.kind != "language" or task.packed):
        raise UserError(f"--packing is for a decoder's texts: not for the task {task.name}")
    if settings.loss_on != RunSettings.loss_on and not task.is_chat:
        raise UserError(
            "--loss-on is for chats, which these rows are not: of a prompt and its completion the "
            "completion is learned, and all of a text"
        )
    if settings.chat_template is not None and not task.has_messages:
        raise UserError("--chat-template is for rows with messages, which these are not")
    return task


def load_tokenizer(settings: RunSettings, task: Task) -> Any:
    """The tokenizer of a run's model, with the chats' template; ValueError if it is of no use."""
    tokenizer = models.load_tokenizer(settings.model)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{settings.model} has no tokenizer: save it beside the model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if task.has_messages:
        loss_on = settings.loss_on if task.is_chat else "all"
        give_template(tokenizer, settings.chat_template, loss_on)
    return tokenizer
