"""Preferences: rows of a `prompt` with an answer that was `chosen` and one that was `rejected`.

Each is a text or the messages of a chat. Without a prompt, it is what both answers begin with.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.bench.tasks.chat import check_end, check_order, plain_messages
from rosa.bench.tasks.files import read_columns
from rosa.bench.tasks.task import ANSWERS, PREFERENCE
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def read_preferences(path: Path) -> Dataset:
    """A file's preferences, and the `row` of the file that each is in, from 1.

    Raises:
        FileNotFoundError, ValueError: the file is of no use, or a row is no preference.
    """
    from datasets import Dataset

    table = read_columns(path)
    missing = [name for name in ANSWERS if name not in table]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}; there are: {', '.join(table)}. --preference "
            "takes rows of prompt, chosen and rejected"
        )
    names = [name for name in PREFERENCE if name in table]
    values = zip(*(table[name] for name in names), strict=True)
    rows = [
        {**_preference(f"{path}: row {number}", dict(zip(names, each, strict=True))), "row": number}
        for number, each in enumerate(values, start=1)
    ]
    for row in rows:
        if isinstance(row["prompt"], str) != isinstance(rows[0]["prompt"], str):
            raise UserError(
                f"{path}: row {row['row']} is {_kind(row)}, and the first {_kind(rows[0])}: write "
                "all rows alike"
            )
    return Dataset.from_list(rows)


def check_alike(path: Path, rows: Dataset, other: Path, others: Dataset) -> None:
    """Raise UserError unless two files' preferences are both texts, or both chats."""
    kinds = _kind(rows[0]), _kind(others[0])
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{other}: row 1 is {kinds[1]}, and those of {path} {kinds[0]}: write both alike"
        )


def _kind(row: dict[str, Any]) -> str:
    return "a text" if isinstance(row["prompt"], str) else "a chat"


def _preference(where: str, given: dict[str, Any]) -> dict[str, Any]:
    """A row's prompt and answers; UserError if it is no preference."""
    row: dict[str, Any]
    if (empty := next((name for name in given if given[name] is None), None)) is not None:
        raise UserError(f"{where} has nothing in column {empty!r}, which other rows have")
    kinds = {name: isinstance(value, list) for name, value in given.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(f"{where}: of {', '.join(given)} some are texts and some are messages")
    if all(kinds.values()):
        row = {n: plain_messages(f"{where}, {n}", value) for n, value in given.items()}
    else:
        for name, value in given.items():
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{where} has no text in column {name!r}")
        row = given
    if row["chosen"] == row["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same: nothing is preferred")
    if "prompt" not in row:
        split = _after_messages if all(kinds.values()) else _after_words
        same = split(*(row[name] for name in ANSWERS))
        row = {"prompt": row["chosen"][:same], **{name: row[name][same:] for name in ANSWERS}}
        if not row["prompt"]:
            raise UserError(
                f"{where} has no prompt, and its answers do not both begin with one: give the "
                "question in a column 'prompt'"
            )
    for name in ANSWERS if all(kinds.values()) else ():
        if row[name][0]["role"] != "assistant":
            raise UserError(
                f"{where}: what was {name} begins with the {row[name][0]['role']}, not with the "
                "assistant's answer"
            )
        check_order(f"{where}, {name} after its prompt", row["prompt"] + row[name])
        check_end(f"{where}, {name},", row[name])
    return {name: row[name] for name in PREFERENCE}


def _after_words(one: str, other: str) -> int:
    """Where what two texts begin with ends: before a space, with something left of both."""
    shared = os.path.commonprefix([one.rstrip(), other.rstrip()])  # noqa: RUF071  # as is meant
    return max((space.start() for space in re.finditer(r"\s+", shared)), default=0)


def _after_messages(one: list[Any], other: list[Any]) -> int:
    """How many messages two chats begin with, with one left of both at least."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)
