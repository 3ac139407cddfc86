"""Language modelling on running text: a folder of text files, cut into pieces of equal length.

<folder>/train.txt, validation.txt   what is learned, and what the best model is chosen by
<folder>/test.txt                    what is reported
<folder>/<name>.txt                  further texts whose loss is reported, as `<name>_loss`
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rosa.bench.tasks.files import read_text
from rosa.bench.tasks.task import DataSettings, Task
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("train", "validation", "test")
_ROW = 4000
"""Characters of a row, about: what is tokenized at a time. Rows end where lines do."""


def load_corpus(settings: DataSettings) -> Task:
    """The texts of a folder (`--data`).

    Raises:
        FileNotFoundError: the folder, or a file in it, is not there.
        UserError: a file is empty, or not UTF-8 text.
    """
    folder = settings.data
    if folder is None:
        raise UserError("task corpus is a folder of text files: name it with --data")
    for name in PARTS:
        if not (folder / f"{name}.txt").is_file():
            raise FileNotFoundError(
                f"{folder / name}.txt is not there: task corpus needs train.txt, validation.txt "
                "and test.txt"
            )
    more = [path for path in sorted(folder.glob("*.txt")) if path.stem not in PARTS]
    train, validation, test = (_rows(folder / f"{name}.txt") for name in PARTS)
    return Task(
        name="corpus",
        kind="language",
        train=train,
        validation=validation,
        test=test,
        more={path.stem: _rows(path) for path in more},
        text_columns=("text",),
        metric="loss",
        greater_is_better=False,
        packed=True,
    )


def _rows(path: Path) -> Dataset:
    """The text in rows, which make it again when they are joined."""
    from datasets import Dataset

    rows, row, length = [], [], 0
    for line in read_text(path).splitlines(keepends=True):
        row.append(line)
        length += len(line)
        if length >= _ROW:
            rows.append("".join(row))
            row, length = [], 0
    return Dataset.from_dict({"text": [*rows, "".join(row)] if row else rows})
