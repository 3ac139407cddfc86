"""Language modelling for decoders: plain text, prompts with completions to learn, or chats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rosa.bench.tasks import chat
from rosa.bench.tasks.files import read_columns, read_table
from rosa.bench.tasks.task import DataSettings, Task
from rosa.bench.tasks.text import VALIDATION_SHARE
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PAIR = ("prompt", "completion")


def load_language(settings: DataSettings) -> Task:
    """A text file; a table with the text column, with `prompt` and `completion`, or of chats.

    Raises:
        FileNotFoundError, ValueError: see `read_table`; also if too few rows are left to validate.
    """
    if settings.train is None:
        raise UserError("no training file")
    columns = tuple(settings.text_columns)
    if columns == ("text",) and chat.holds_chats(settings.train):
        names, read = (chat.COLUMN,), chat.read_chats
    else:
        if columns == ("text",) and set(PAIR) <= set(read_columns(settings.train)):
            columns = PAIR
        if len(columns) not in (1, 2):
            raise UserError(
                f"a decoder takes a text column, or a prompt and a completion: {columns}"
            )
        names = ("text",) if len(columns) == 1 else PAIR

        def read(path: Path) -> Dataset:
            rows = read_table(path, columns).select_columns(list(columns))
            return rows.rename_columns(dict(zip(columns, names, strict=True)))

    train = read(settings.train)
    if settings.validation is not None:
        validation = read(settings.validation)
    elif len(train) < 2:
        raise UserError(f"{settings.train} has one text only: give a --validation file")
    else:
        held = max(round(VALIDATION_SHARE * len(train)), 1)
        parts = train.train_test_split(test_size=held, seed=settings.seed)
        train, validation = parts["train"], parts["test"]
    return Task(
        name="chat" if names == (chat.COLUMN,) else "language",
        kind="language",
        train=train,
        validation=validation,
        text_columns=names,
        metric="loss",
        greater_is_better=False,
    )
