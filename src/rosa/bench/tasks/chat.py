"""Chats: rows whose `messages` have a role and a content each, in a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.bench.tasks.files import JSON_LINES, read_columns
from rosa.bench.tasks.task import ANSWERS, MESSAGES
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

FOLLOWED_BY = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Whose message may follow whose. Some templates take others too, and make a text of no sense."""
ROLES = tuple(FOLLOWED_BY)
UNLEARNED = ("tool_calls", "function_call")
USUAL_LENGTH, LENGTH_OF_A_CHAT = 128, 1024
"""Tokens of the longest text where nothing else is said, and of the longest chat."""


def holds_chats(path: Path) -> bool:
    """Whether a file's first row is a chat; False for a file that cannot be read as one."""
    return MESSAGES in _first_row(path)


def _first_row(path: Path) -> dict[str, Any]:
    """A file's first row; an empty one of a file that cannot be read, or is no JSON lines."""
    if path.suffix.lower() not in JSON_LINES or not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline()
            while first.isspace():
                first = file.readline()
            is_list = first.lstrip().startswith("[")
            found = json.loads(first + file.read() if is_list else first)
    except ValueError:
        return {}
    row = found[0] if isinstance(found, list) and found else found
    return row if isinstance(row, dict) else {}


def usual_length(path: Path | None) -> int:
    """Tokens of the longest text of a file, if the user says nothing of it."""
    first = {} if path is None else _first_row(path)
    return LENGTH_OF_A_CHAT if MESSAGES in first or {*ANSWERS} & {*first} else USUAL_LENGTH


def read_chats(path: Path) -> Dataset:
    """A file's chats as `messages`, and the `row` of the file that each is in, from 1.

    Raises:
        FileNotFoundError, ValueError: the file is of no use, or a row is no chat to learn from.
    """
    from datasets import Dataset

    table = read_columns(path)
    chats = table.get(MESSAGES)
    if (row := next((n for n, t in enumerate(table.get("tools", ()), 1) if t), None)) is not None:
        raise UserError(
            f"{path}: row {row} has tools, which are not put into the chat's template here: leave "
            "the column out, or describe them in a system message"
        )
    if chats is None:
        raise UserError(f"{path} has no column {MESSAGES!r}, as the other file of chats has")
    rows = range(1, len(chats) + 1)
    plain = [plain_messages(f"{path}: row {n}", chat) for n, chat in zip(rows, chats, strict=True)]
    for row, chat in zip(rows, plain, strict=True):
        if not any(message["role"] == "assistant" for message in chat):
            raise UserError(
                f"{path}: row {row} has no message of the assistant: there is nothing to learn"
            )
        check_order(f"{path}: row {row}", chat)
        check_end(f"{path}: row {row}", chat)
    return Dataset.from_dict({MESSAGES: plain, "row": list(rows)})


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """A file's chats up to the last word of the assistant, which is asked for anew.

    Raises:
        FileNotFoundError, ValueError: the file is of no use, or a row is no chat to answer.
    """
    chats = []
    for row, chat in enumerate(read_columns(path)[MESSAGES], start=1):
        messages = plain_messages(f"{path}: row {row}", chat)
        check_order(f"{path}: row {row}", messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages[-1]["role"] == "system":
            raise UserError(f"{path}: row {row} has nothing to answer: no message of the user")
        chats.append(messages)
    return chats


def check_order(row: str, chat: list[dict[str, str]]) -> None:
    """Raise UserError unless user and assistant take turns, from the user on."""
    last, allowed = "", ("system", "user")
    for number, role in enumerate((message["role"] for message in chat), start=1):
        if role not in allowed:
            place = f"after the {last}'s" if last else "at the beginning"
            way_out = "join the two" if role == last else "leave it out, or put one before it"
            way_out = "put it first, or leave it out" if role == "system" else way_out
            expected = "'s or the ".join(allowed)
            raise UserError(
                f"{row}: message {number} is the {role}'s, {place}, where the {expected}'s "
                f"belongs: {way_out}"
            )
        last, allowed = role, FOLLOWED_BY[role]


def check_end(row: str, chat: list[dict[str, str]]) -> None:
    """Raise UserError unless the assistant has the last word."""
    if (role := chat[-1]["role"]) != "assistant":
        raise UserError(
            f"{row} ends with the {role}'s message, which nothing answers: leave it out, or add "
            "the answer"
        )


def _no_text(message: dict[str, Any]) -> str:
    """What a message's content is that is no text."""
    content = message.get("content")
    if isinstance(content, str):
        return "is empty"
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        return "is a list of texts: join them into one"
    if content is None:
        called = "tool_calls" in message
        return "is a call of tools, which are not trained here" if called else "is missing"
    return "is no text: chats of images are not trained here"


def plain_messages(row: str, chat: Any) -> list[dict[str, str]]:
    """A chat's messages, of role and content alone; UserError if it is none."""
    if not isinstance(chat, list) or not chat:
        raise UserError(f"{row} has no messages: a chat is a list of them, with role and content")
    for number, message in enumerate(chat, start=1):
        given = message if isinstance(message, dict) else {}
        if given.get("role") not in ROLES:
            raise UserError(
                f"{row}: the role of message {number} is {given.get('role')!r}; there are: "
                f"{', '.join(ROLES)}"
            )
        content = given.get("content")
        if not isinstance(content, str) or not content.strip():
            raise UserError(
                f"{row}: the content of message {number} ({given['role']}) {_no_text(given)}"
            )
        if unlearned := next((name for name in UNLEARNED if given.get(name)), None):
            raise UserError(
                f"{row}: message {number} has {unlearned}, which are not trained here: leave the "
                "row out, or write them into the content"
            )
        if given.get("weight") == 0:
            raise UserError(
                f"{row}: message {number} has weight 0, and all that the assistant says is "
                "learned here: leave the row out"
            )
    return [{name: message[name] for name in ("role", "content")} for message in chat]
