"""Language modelling for decoders: plain text, or prompts with completions to learn."""

from __future__ import annotations

from rosa.bench.tasks.files import read_table
from rosa.bench.tasks.task import DataSettings, Task
from rosa.bench.tasks.text import VALIDATION_SHARE
from rosa.errors import UserError

PAIR = ("prompt", "completion")


def load_language(settings: DataSettings) -> Task:
    """A text file, or a table with the text column, or one with `prompt` and `completion`.

    Raises:
        FileNotFoundError, ValueError: see `read_table`; also if too few rows are left to validate.
    """
    if settings.train is None:
        raise UserError("no training file")
    columns = tuple(settings.text_columns)
    train = read_table(settings.train, ())
    if columns == ("text",) and set(PAIR) <= set(train.column_names):
        columns = PAIR
    if len(columns) not in (1, 2):
        raise UserError(f"a decoder takes a text column, or a prompt and a completion: {columns}")
    names = ("text",) if len(columns) == 1 else PAIR

    def plain(path):
        rows = read_table(path, columns).select_columns(list(columns))
        return rows.rename_columns(dict(zip(columns, names, strict=True)))

    train = plain(settings.train)
    if settings.validation is not None:
        validation = plain(settings.validation)
    elif len(train) < 2:
        raise UserError(f"{settings.train} has one text only: give a --validation file")
    else:
        held = max(round(VALIDATION_SHARE * len(train)), 1)
        parts = train.train_test_split(test_size=held, seed=settings.seed)
        train, validation = parts["train"], parts["test"]
    return Task(
        name="language",
        kind="language",
        train=train,
        validation=validation,
        text_columns=names,
        metric="loss",
        greater_is_better=False,
    )
