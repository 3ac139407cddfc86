"""What decoders learn: plain text, prompts with completions, chats, or preferences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rosa.bench.processes import say
from rosa.bench.tasks import chat, preference
from rosa.bench.tasks.files import read_columns, read_table
from rosa.bench.tasks.task import ANSWERS, MESSAGES, PREFERENCE, DataSettings, Task
from rosa.bench.tasks.text import VALIDATION_SHARE
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PAIR = ("prompt", "completion")
NAMES = {(MESSAGES,): "chat", PREFERENCE: "preference"}
FORMS = (
    "A decoder learns rows of text, of prompt and completion, of messages (a chat, with role and "
    "content), or with --preference of prompt, chosen and rejected; a text may be called "
    "otherwise by --text-column"
)


def load_language(settings: DataSettings) -> Task:
    """A text file; a table with the text column, of pairs, of chats, or of preferences.

    Raises:
        FileNotFoundError, ValueError: see `read_table`; also if too few rows are left to validate.
    """
    if settings.train is None:
        raise UserError("no training file")
    columns = tuple(settings.text_columns)
    if settings.preference:
        names, read = PREFERENCE, preference.read_preferences
    elif columns == ("text",) and chat.holds_chats(settings.train):
        names, read = (MESSAGES,), chat.read_chats
    else:
        there = set(read_columns(settings.train))
        if columns == ("text",) and set(PAIR) <= there:
            columns = PAIR
        elif columns == ("text",) and set(ANSWERS) <= there:
            raise UserError(f"{settings.train} has chosen and rejected answers: add --preference")
        if len(columns) not in (1, 2):
            raise UserError(
                f"a decoder takes a text column, or a prompt and a completion: {columns}"
            )
        names = ("text",) if len(columns) == 1 else PAIR
        if settings.label_column != DataSettings.label_column:
            raise UserError(
                "--label-column is for models that classify; this one is a decoder, which learns "
                "texts, or prompts and completions"
            )
        if settings.label_column in there - {*columns}:
            say(
                f"{settings.train}: a decoder learns the column {columns[0]}, and the column "
                f"{settings.label_column} is left out: to classify, take an encoder"
            )

        def read(path: Path) -> Dataset:
            rows = read_table(path, columns, FORMS).select_columns(list(columns))
            rows = rows.rename_columns(dict(zip(columns, names, strict=True)))
            return rows.add_column("row", list(range(1, len(rows) + 1)))  # type: ignore[call-arg]

    train = read(settings.train)
    if settings.validation is not None:
        validation = read(settings.validation)
        if settings.preference:
            preference.check_alike(settings.train, train, settings.validation, validation)
    elif len(train) < 2:
        raise UserError(f"{settings.train} has one text only: give a --validation file")
    else:
        held = max(round(VALIDATION_SHARE * len(train)), 1)
        parts = train.train_test_split(test_size=held, seed=0)  # for all seeds
        train, validation = parts["train"], parts["test"]
    return Task(
        name=NAMES.get(names, "language"),
        kind="language",
        train=train,
        validation=validation,
        text_columns=names,
        metric="loss",
        greater_is_better=False,
    )
