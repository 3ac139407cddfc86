"""E2E NLG (Novikova et al., 2017): a restaurant's description from a meaning representation.

The prompt is ``Input: <meaning representation> Output:``, as in the paper (section 4.2). Meaning
representations have many references: the training set holds a row per reference, and the scores
group them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rosa.bench.tasks.files import read_table
from rosa.bench.tasks.generation_metrics import e2e_scores
from rosa.bench.tasks.task import DataSettings, Generation, Task, tested
from rosa.bench.tasks.text import VALIDATION_SHARE
from rosa.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "tuetschek/e2e_nlg"
FILES = {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"}

Pairs = list[tuple[str, str]]


def load_e2e(settings: DataSettings) -> Task:
    """E2E from the folder of the challenge's CSV files (`--data`), or from the hub.

    Without trainset.csv, devset.csv is the training set, and a tenth of its meaning
    representations, with all their references, is held out for validation.

    Raises:
        FileNotFoundError: a file is missing, or the hub cannot be reached.
        ValueError: a file lacks the columns `mr` and `ref`.
    """
    if settings.data is None:
        train, validation, test = (_from_hub(split) for split in FILES)
    elif (settings.data / FILES["train"]).is_file():
        train, validation, test = (_from_file(settings.data / name) for name in FILES.values())
    else:
        train, validation = _hold_out(_from_file(settings.data / FILES["validation"]))
        test = _from_file(settings.data / FILES["test"])
    references: dict[str, list[str]] = {}
    for meaning, reference in test:
        references.setdefault(meaning, []).append(reference)
    meanings = list(references.items())
    shown = [meanings[row] for row in tested(len(meanings), settings.limit_test)]
    return Task(
        name="e2e",
        kind="language",
        train=_dataset(train),
        validation=_dataset(validation),
        text_columns=("prompt", "completion"),
        metric="loss",
        greater_is_better=False,
        generation=Generation(
            prompts=tuple(prompt(meaning) for meaning, _ in shown),
            references=tuple(tuple(texts) for _, texts in shown),
            score=e2e_scores,
            metric="bleu",
        ),
    )


def prompt(meaning: str) -> str:
    """The text that the model continues."""
    return f"Input: {meaning} Output:"


def _hold_out(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Split a tenth of the meaning representations off, always the same ones."""
    from sklearn.model_selection import train_test_split

    meanings = list(dict.fromkeys(meaning for meaning, _ in pairs))
    if len(meanings) < 2:
        raise UserError("too few meaning representations to hold some out for validation")
    held = set(train_test_split(meanings, test_size=VALIDATION_SHARE, random_state=0)[1])
    return [p for p in pairs if p[0] not in held], [p for p in pairs if p[0] in held]


def _dataset(pairs: Pairs) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(
        {"prompt": [prompt(m) for m, _ in pairs], "completion": [" " + text for _, text in pairs]}
    )


def _from_file(path: Path) -> Pairs:
    rows = read_table(path, ("mr", "ref"))
    return list(zip(rows["mr"], rows["ref"], strict=True))


def _from_hub(split: str) -> Pairs:
    from datasets import load_dataset

    try:
        rows = load_dataset(HUB, split=split)
    except Exception as error:  # the client's errors differ by what went wrong
        raise FileNotFoundError(
            f"E2E could not be had from the hub ({type(error).__name__}: {error}). Give --data "
            f"<folder> with {', '.join(FILES.values())}"
        ) from error
    return list(zip(rows["meaning_representation"], rows["human_reference"], strict=True))  # type: ignore[call-overload]
