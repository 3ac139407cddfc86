"""Reading tables of text: CSV, TSV, JSON lines and plain text, through pandas and `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".json", ".jsonl")


def read_table(path: Path, columns: tuple[str, ...]) -> Dataset:
    """Read a file's rows, of which `columns` must be there, filled in every row.

    A `.txt` file is read as one column `text`, one row per paragraph (blank lines between them).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, of an unknown kind, unreadable, or lacks a column or a value.
    """
    import pandas as pd
    from datasets import Dataset

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there (or not a file): check the path")
    if not path.read_bytes().strip():
        raise ValueError(f"{path} is empty")
    if path.suffix == ".txt":
        paragraphs = [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n")]
        rows = Dataset.from_dict({"text": [p for p in paragraphs if p]})
    elif path.suffix in (*_SEPARATORS, *_JSON_LINES):
        try:
            if path.suffix in _JSON_LINES:
                table = pd.read_json(path, lines=True)
            else:
                # Only nothing between two separators is missing: "NA" is a word.
                separator = _SEPARATORS[path.suffix]
                table = pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""])
        except ValueError as error:  # the parsers' errors are ValueErrors
            hint = " (one object a line)" if path.suffix in _JSON_LINES else ""
            raise ValueError(f"{path} cannot be read as {path.suffix}{hint}: {error}") from error
        rows = Dataset.from_pandas(table, preserve_index=False)
    else:
        raise ValueError(
            f"{path}: unknown kind of file; use {', '.join([*_SEPARATORS, *_JSON_LINES, '.txt'])}"
        )
    for column in columns:
        if column not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise ValueError(
                f"{path} has no column {column!r}; there are: {there}. Name yours with "
                "--text-column and --label-column"
            )
        empty = [i for i, value in enumerate(rows[column]) if value is None or value == ""]
        if empty:
            raise ValueError(f"{path}: row {empty[0] + 1} has nothing in column {column!r}")
    if len(rows) == 0:
        raise ValueError(f"{path} has no rows")
    return rows
