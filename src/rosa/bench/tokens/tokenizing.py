"""Token ids and labels from a task's texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress, count
from operator import not_
from typing import Any

from rosa.bench.processes import say
from rosa.bench.setup.settings import RunSettings
from rosa.bench.tasks.chat import usual_length
from rosa.bench.tasks.task import ANSWERS, Task
from rosa.bench.tokens.encoding import (
    Encoded,
    chat_encoder,
    encode_text,
    pair_of_chats,
    pair_of_texts,
)
from rosa.errors import UserError

ANSWER_IDS = ("chosen_ids", "rejected_ids")
_BATCH = 1000
_NAMED = 10
"""Of the rows that are left out, how many are named."""


def tokenize(
    settings: RunSettings, task: Task, reads: int | None, tokenizer: Any
) -> dict[str, Any]:
    """The task's splits as token ids with labels, none longer than the model can read.

    `reads` is how many tokens that are: see `reading.longest_input`; None for any number.

    Raises:
        ValueError: a text is shorter than one piece; no completion is within the longest length.
    """
    asked = settings.max_length or usual_length(settings.train)
    most = min(reads or tokenizer.model_max_length, tokenizer.model_max_length)
    longest = min(asked, most)
    if longest < 1:
        raise UserError(
            f"method {settings.method} leaves no place for a text: the model has {-longest} too "
            "few for the tokens that the method puts before it; choose another model or method"
        )
    way_out = "raise --max-length"
    if longest < asked:
        say(f"the model reads {longest} tokens at most: longer texts are cut there")
    if longest == most:
        way_out = "the model reads no more, so shorten what comes before, or take one that does"
    if task.packed:
        return {name: _packed(name, part, tokenizer, longest) for name, part in _parts(task)}
    if task.kind == "language":
        learn = _learner(settings, task, tokenizer, way_out)
        rows = {n: learn(part, longest, _place(settings, n)) for n, part in _parts(task)}
    else:
        rows = {n: _tokenize(task, tokenizer, part, longest) for n, part in _parts(task)}
    cut = sum(length >= longest for length in lengths(rows["train"]))
    if cut:
        say(f"{cut} of {len(rows['train'])} training texts reach {longest} tokens (--max-length)")
    if settings.packing:
        rows["train"] = _together(rows["train"], longest)
    return rows


def lengths(rows: Any) -> list[int]:
    """Tokens of each row; of a preference, with the longer answer."""
    if "input_ids" in rows.column_names:
        return list(map(len, rows["input_ids"]))
    answers = (map(len, rows[name]) for name in ANSWER_IDS)
    prompts = map(len, rows["prompt_ids"])
    return [n + max(both) for n, *both in zip(prompts, *answers, strict=True)]


def digest(rows: dict[str, Any]) -> str:
    """Of the token ids and labels of `tokenize`, to tell whether they are the same again."""
    found = hashlib.blake2b(digest_size=16)
    for name, part in sorted(rows.items()):
        for batch in part.with_format("arrow").iter(_BATCH):
            for column in sorted(batch.column_names):
                values = batch.column(column).combine_chunks()
                found.update(f"{name} {column} {len(values)}".encode())
                if hasattr(values, "value_lengths"):
                    found.update(values.value_lengths().to_numpy(False).tobytes())
                    values = values.flatten()
                found.update(values.to_numpy(False).tobytes())
    return found.hexdigest()


def _parts(task: Task) -> list[tuple[str, Any]]:
    parts = [("train", task.train), ("validation", task.validation), ("test", task.test)]
    parts += task.more.items()
    return [(name, part) for name, part in parts if part is not None]


def _learner(
    settings: RunSettings, task: Task, tokenizer: Any, way_out: str
) -> Callable[[Any, int, str], Any]:
    """What makes token ids of rows, given the longest length and where the rows are from."""
    if task.is_preference:
        return partial(_tokenize_preferences, tokenizer, way_out)
    chat = chat_encoder(tokenizer, settings.loss_on) if task.is_chat else None
    encode = chat or partial(encode_text, tokenizer)
    return partial(_tokenize_language, encode=encode, way_out=way_out)


def _tokenize(task: Task, tokenizer: Any, rows: Any, longest: int) -> Any:
    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in task.text_columns]
        encoded = tokenizer(*texts, truncation=True, max_length=longest)
        return {**encoded, "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def _packed(name: str, rows: Any, tokenizer: Any, length: int) -> Any:
    """A text's token ids in pieces of one length, from its first token on; what is over is left."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        pieces = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return {
            "input_ids": pieces,
            "attention_mask": [[1] * length for _ in pieces],
            "labels": [list(piece) for piece in pieces],
        }

    with _no_warning_of_length(tokenizer):
        encoded = rows.map(
            encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing"
        )
    pieces = encoded.map(cut, batched=True, batch_size=None, desc="Cutting")
    if len(pieces) == 0:
        raise UserError(
            f"the {name} text has fewer than {length} tokens: give more, or lower --max-length"
        )
    return pieces


@contextmanager
def _no_warning_of_length(tokenizer: Any) -> Iterator[None]:
    """Rows are tokenized whole and cut afterwards: that they are long is no news."""
    before, tokenizer.model_max_length = tokenizer.model_max_length, 2**62
    try:
        yield
    finally:
        tokenizer.model_max_length = before


def _tokenize_language(
    rows: Any, longest: int, place: str, encode: Callable[[dict[str, Any]], Encoded], way_out: str
) -> Any:
    """Token ids with labels, cut at the longest length; rows with nothing left to learn go."""

    def cut(row: dict[str, Any]) -> dict[str, list[int]]:
        ids, labels = (values[:longest] for values in encode(row))
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    encoded = rows.map(cut, remove_columns=rows.column_names, desc="Tokenizing")
    return _only(
        encoded,
        rows,
        lambda row: any(label != -100 for label in row["labels"]),
        place,
        f"no completion or answer is within the first {longest} tokens: {way_out}",
        f"texts have nothing to learn within the first {longest} tokens: they are left out; "
        f"{way_out}",
    )


def _only(
    encoded: Any,
    rows: Any,
    is_learned: Callable[[dict[str, Any]], bool],
    place: str,
    none: str,
    some_not: str,
) -> Any:
    """The rows of which something is learned; an error if there are none, else which ones go."""
    learned = [is_learned(row) for row in encoded]
    if all(learned):
        return encoded
    lost = list(compress(count(), map(not_, learned)))
    named = ""
    if "row" in rows.column_names:
        numbers = sorted(rows[lost]["row"])
        more = ", ..." if len(lost) > _NAMED else ""
        named = f" (row{'s' * (len(lost) > 1)} {', '.join(map(str, numbers[:_NAMED]))}{more})"
    if not any(learned):
        raise UserError(f"{place}{named}: {none}")
    say(f"{place}: {len(lost)} of {len(rows)} {some_not}{named}")
    return encoded.select(list(compress(count(), learned)))


def _place(settings: RunSettings, name: str) -> str:
    """Where the rows of a part are from."""
    files = {"train": settings.train, "validation": settings.validation}
    if settings.hold_out:
        files = {"train": settings.train, "test": settings.validation}
    if (file := files.get(name)) is not None:
        return str(file)
    if name == "validation" and settings.train is not None:
        return f"{settings.train}, the rows held out to validate"
    return f"the {name} data"


def _tokenize_preferences(tokenizer: Any, way_out: str, rows: Any, longest: int, place: str) -> Any:
    """Ids of prompts and of both answers, cut at the longest length; rows without a choice go."""
    encode = pair_of_chats if isinstance(rows[0]["prompt"], list) else pair_of_texts

    def cut(row: dict[str, Any]) -> dict[str, list[int]]:
        (prompt, chosen), (other, rejected) = (
            encode(tokenizer, row, row[name]) for name in ANSWERS
        )
        # Where an answer's first letters and the prompt's last make one token, it is the answer's.
        same = min(len(prompt), len(other))
        chosen, rejected = prompt[same:] + chosen, other[same:] + rejected
        rest = max(longest - same, 0)
        return {
            "prompt_ids": prompt[:same],
            "chosen_ids": chosen[:rest],
            "rejected_ids": rejected[:rest],
        }

    encoded = rows.map(cut, remove_columns=rows.column_names, desc="Tokenizing")
    return _only(
        encoded,
        rows,
        lambda row: row["chosen_ids"] != row["rejected_ids"],
        place,
        f"no two answers differ within the first {longest} tokens: {way_out}",
        f"preferences do not differ within the first {longest} tokens: they are left out; "
        f"{way_out}",
    )


def _together(rows: Any, longest: int) -> Any:
    """Several texts in a row; `seq_lengths` tells where each ends."""
    from trl.data_utils import pack_dataset

    packed = pack_dataset(rows.select_columns(["input_ids", "labels"]), longest, "bfd")
    say(f"{len(rows)} training texts are packed into {len(packed)} rows of {longest} tokens")
    return packed
