"""Reading tables of text: CSV, TSV, JSON lines, Parquet and plain text.

Every value is taken as the text that it is: a label `01` or a text `1e5` is not a number here.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.bench.tasks.task import MESSAGES
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}
"""Of each kind: the first of them that the header has. Spreadsheets write ; in half of Europe."""
JSON_LINES = (".json", ".jsonl")
_PARQUET = ".parquet"
KINDS = (*_SEPARATORS, *JSON_LINES, ".txt", _PARQUET)
"""How the names of files that are read end."""


def read_table(path: Path, columns: tuple[str, ...], forms: str = "") -> Dataset:
    """Read a file's rows, of which `columns` must be there, filled in every row; all as strings.

    `forms` says in an error what rows may be, where that is more than these columns.

    A `.txt` file is read as one column `text`: a row per paragraph (blank lines between them), or
    per line if there are no blank lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, of an unknown kind, unreadable, or lacks a column or a value.
    """
    from datasets import Dataset

    table = read_columns(path)
    no_text = (list, dict, bool) if forms else (list, dict)  # a label may be true or false
    for column in columns:
        if column not in table:
            chats = ""
            if MESSAGES in table:
                chats = " (chats are JSON lines)" if forms else " (chats are for a decoder)"
            raise UserError(
                f"{path} has no column {column!r}; there are: {', '.join(table)}{chats}. "
                + (forms or "Name yours with --text-column and --label-column")
                + (", each text column by an option of its own" if "," in column else "")
            )
        for number, value in enumerate(table[column], start=1):
            if value is None or value != value or not str(value).strip():  # NaN is none
                raise UserError(f"{path}: row {number} has nothing in column {column!r}")
            if isinstance(value, no_text):
                raise UserError(f"{path}: row {number} has no plain text in column {column!r}")
    return Dataset.from_dict({name: [str(v) for v in table[name]] for name in table})


def read_text(path: Path) -> str:
    """A file's text, its line ends as `\\n`; raises for what is missing, empty or no text."""
    _check_there(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it first") from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def read_columns(path: Path) -> dict[str, list[Any]]:
    """A file's columns, their values as they are; raises as `read_table` does."""
    kind = path.suffix.lower()
    table: dict[str, list[Any]]
    if path.is_file() and kind not in KINDS:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(KINDS)}")
    if kind == _PARQUET:
        table = _parquet(path)
    elif kind == ".txt":
        table = {"text": _documents(read_text(path))}
    elif kind in JSON_LINES:
        table = _objects(path, read_text(path))
    else:
        table = _cells(path, *_separated(read_text(path), _SEPARATORS[kind]))
    if not any(table.values()):
        raise UserError(f"{path} has no rows")
    return table


def _check_there(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder: give its files, one of them an option")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there (or not a file): check the path")


def _parquet(path: Path) -> dict[str, list[Any]]:
    from pyarrow import ArrowException  # comes with datasets
    from pyarrow.parquet import read_table

    _check_there(path)
    try:
        return read_table(path).to_pydict()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _documents(content: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", content.strip())
    return [p.strip() for p in (paragraphs if len(paragraphs) > 1 else content.strip().split("\n"))]


def _cells(path: Path, content: str, separator: str) -> dict[str, list[str]]:
    # Much TSV knows no quoting: there a lone quotation mark must not swallow lines.
    ways = (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if separator == "\t" else (csv.QUOTE_MINIMAL,)
    tables, failures = [], []
    for quoting in ways:
        try:
            tables.append(_parse(content, separator, quoting))
        except csv.Error as error:
            failures.append(error)
    if not tables:
        raise UserError(
            f"{path} cannot be read: {failures[0]}: check its separators and quotation marks"
        )
    header, *rows = max(tables, key=len)
    if twice := [name for name, times in Counter(header).items() if name.strip() and times > 1]:
        raise UserError(f"{path} has two columns of the name {twice[0]!r}: rename one of them")
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _separated(content: str, signs: str) -> tuple[str, str]:
    """A table without the line that may say its separator (Excel's "sep=;"), and the separator."""
    header, _, rest = content.lstrip().partition("\n")
    if said := re.fullmatch(r"sep=(\S|\t)\s*", header):
        return rest, said[1]
    for sign in signs:
        with contextlib.suppress(csv.Error):  # it stands inside quotation marks
            if len(next(csv.reader([header], delimiter=sign, strict=True))) > 1:
                return content, sign
    return content, next((sign for sign in signs if sign in header), signs[0])


def _parse(content: str, separator: str, quoting: Any) -> list[list[str]]:
    """All rows, the header first, of equal length; csv.Error if they are not."""
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    lines = io.StringIO(content, newline="")
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    rows = [row for row in reader if row]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise csv.Error(f"row {number} has {len(row)} cells, the header has {len(rows[0])}")
    return rows


def _objects(path: Path, content: str) -> dict[str, list[Any]]:
    number = 1
    try:
        if content.lstrip().startswith("["):  # the whole file is one array
            rows = json.loads(content)
        else:
            rows = []
            for number, line in enumerate(content.split("\n"), start=1):  # noqa: B007
                if line.strip():
                    rows.append(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON, one object a line: line {number}: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}: row {number} is no object of columns with values, as "
                '{"text": "..."} or {"messages": [...]}'
            )
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(
                f"{path}: row {number} has half of a character ({half}): write it as UTF-8"
            ) from error
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
