"""What a task is, and where its data lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

MESSAGES = "messages"
"""The column of chats."""
ANSWERS = ("chosen", "rejected")
PREFERENCE = ("prompt", *ANSWERS)
"""The columns of preferences."""

Metrics = Callable[["np.ndarray", "np.ndarray"], dict[str, float]]


@dataclass(frozen=True)
class Generation:
    """What a decoder writes after training, and how that is scored.

    Attributes:
        prompts: the texts to continue.
        references: for each prompt the texts that would be right.
        score: metrics from the model's texts and the references.
        metric: the one that is reported.
    """

    prompts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]
    metric: str


@dataclass(frozen=True)
class Task:
    """A task, ready to be tokenized.

    Attributes:
        name: as on the command line.
        kind: `classification` has `text_columns` and `label` (int), `regression` the same with a
            number; `language` has one text column, `prompt` and `completion`, of which only the
            completion is learned, `messages`, the chats, or `prompt`, `chosen` and `rejected`.
        train, validation: the data; a `test` split is reported if there is one.
        more: further sets that are reported, by name.
        generation: what to write and score after training, for a decoder.
        packed: the texts of a set are one text, to be cut into pieces of equal length.
        text_columns: one, or two for pairs.
        labels: names of the classes, by id.
        metric: what the best model is chosen by; `greater_is_better` says how.
        compute: metrics from predicted and true class ids (or numbers), each (examples,).
    """

    name: str
    kind: Literal["classification", "regression", "language"]
    train: Dataset
    validation: Dataset
    text_columns: tuple[str, ...]
    metric: str
    greater_is_better: bool = True
    labels: tuple[str, ...] = ()
    compute: Metrics | None = None
    test: Dataset | None = None
    more: Mapping[str, Dataset] = field(default_factory=dict)
    generation: Generation | None = None
    packed: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether its rows are chats."""
        return self.text_columns == (MESSAGES,)

    @property
    def is_preference(self) -> bool:
        """Whether its rows are answers of which one is preferred."""
        return self.text_columns == PREFERENCE

    @property
    def has_messages(self) -> bool:
        """Whether its texts are made of messages by a template."""
        return self.is_chat or (self.is_preference and isinstance(self.train[0]["prompt"], list))

    @property
    def reported(self) -> str:
        """The metric that a comparison reports, as it is called in a run's record."""
        if self.generation is not None:
            return self.generation.metric
        return self.metric if self.test is None else f"test_{self.metric}"


@dataclass(frozen=True)
class DataSettings:
    """Where a task's data lies; see `rosa train --help`.

    With `hold_out` a tenth of the training data is the validation set, and the task's own
    validation set is what is reported (`test_`): settings are then chosen on other data.
    """

    task: str | None = None
    data: Path | None = None
    train: Path | None = None
    validation: Path | None = None
    text_columns: Sequence[str] = ("text",)
    label_column: str = "label"
    limit_train: int | None = None
    limit_test: int | None = None
    hold_out: bool = False
    preference: bool = False
    seed: int = 0


def tested(rows: int, limit: int | None) -> list[int]:
    """Which of so many test examples are reported on: `limit` of them, the same for every seed.

    A sample and not the first: files of test data are often sorted, by label or by name.
    """
    if limit is None or limit >= rows:
        return list(range(rows))
    return sorted(Random(0).sample(range(rows), limit))
