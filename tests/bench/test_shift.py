"""The shift from one text to another: what is made, kept, compared, and refused before any work."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosa.bench import shift
from rosa.bench.report.results import read_comparison
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import runs
from rosa.bench.tasks import python_texts
from rosa.bench.tokens.tokenizing import tokenize
from rosa.bench.train import training
from rosa.bench.train.preparing import load_task
from rosa.errors import UserError
from tests.helpers import fails, run
from tests.models import save_with_tokenizer, tiny_bert, tiny_gpt2

CONTEXT = 16
SMALL = shift.Pretraining(vocabulary=300, layers=1, width=16, heads=2, steps=4, batch_size=4)


def words(count: int, letters: str) -> str:
    def word() -> str:
        return "".join(random.choices(letters, k=random.randint(2, 7)))

    lines = [" ".join(word() for _ in range(random.randint(3, 9))) for _ in range(count)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    return words(900, "abcdefghijkl"), words(900, "mnopqrstuvwxyzä")


@pytest.fixture(scope="module")
def files(texts, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "source.txt", folder / "target.txt"]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def world(texts, cache) -> shift.World:
    return shift.prepare(texts, cache, CONTEXT, pretraining=SMALL)


def test_the_model_is_made_once_and_what_is_left_out_of_its_texts_is_reported(world, texts, cache):
    data = {p.stem: p.read_text("utf-8") for p in world.data.glob("*.txt")}
    assert data["train"] + data["validation"] + data["test"] == texts[1]
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.name != ".lock"}
    again = shift.prepare(texts, cache, CONTEXT, pretraining=SMALL)
    assert again == world
    assert before == {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.name != ".lock"}
    pretraining = world.data.parent / "pretraining"
    learned = (pretraining / "train.txt").read_text("utf-8")
    for held in (data["test"], data["validation"], data["source"]):
        assert held.strip()
        assert held not in learned
    assert data["source"] == texts[0][-len(data["source"]) :]
    other = shift.prepare(texts, cache, CONTEXT + 1, pretraining=SMALL)
    assert other.model != world.model


def test_the_losses_before_training_are_the_pretrained_models(world):
    model = AutoModelForCausalLM.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    settings = RunSettings(
        world.model, world.data, task="corpus", data=world.data, max_length=CONTEXT
    )
    rows = tokenize(settings, load_task(settings), None, tokenizer)
    for name, key in (("test", "test_loss"), ("source", "source_loss")):
        ids = torch.tensor(rows[name]["input_ids"][:])
        text = (world.data / f"{name}.txt").read_text("utf-8")
        assert text.startswith(tokenizer.decode(ids.flatten()[:50]))  # nothing is left out
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert world.start[key] == pytest.approx(float(loss), abs=1e-5)


def test_the_command_compares_methods_on_both_texts(world, files, tmp_path, capsys):
    output = tmp_path / "runs"
    source, target = files
    how = ["--source", source, "--target", target, "--model", world.model, "--max-length", CONTEXT]
    how += ["--methods", "rosa+resample_every=3,full", "--steps", 8, "--batch-size", 4]
    how += ["--lrs", "1e-2", "--output", output, "--cache", tmp_path / "cache", "--ranks", "2"]
    run("shift", *how)
    printed = capsys.readouterr().out
    assert "before training: test loss" in printed
    found = read_comparison(output)
    assert found.further == ["source_loss"]
    assert found.before["source_loss"] == pytest.approx(world.start["source_loss"], abs=1e-4)
    assert len(found.rows) == 2
    for row in found.rows:
        assert row.records[0].steps == 8
        assert row.records[0].reported == "test_loss"
        assert [e["step"] for e in row.histories[0]["epochs"]] == [2, 4, 6, 8]
        assert [e["step"] for e in row.histories[0]["changes"]["epochs"]] == [2, 4, 6, 8]
    (drawn,) = (h["drawn_at"] for row in found.rows for h in row.histories if "drawn_at" in h)
    rosa = next(row for row in found.rows if row.method.startswith("rosa"))
    assert len(drawn) == rosa.records[0].resamples >= 2
    page = (output / "report.html").read_text()
    assert "Learned and forgotten" in page
    run("shift", *how)  # nothing is left to do
    assert "2 cells, 2 of them finished before" in capsys.readouterr().out


def test_ranks_left_out_are_the_commands_own(world, files, tmp_path):
    """Of the methods that have one; the others need none, as where no method has one."""
    source, target = files
    how = ["--source", source, "--target", target, "--model", world.model, "--max-length", CONTEXT]
    how += ["--steps", 4, "--batch-size", 2, "--cache", tmp_path / "cache"]
    for methods, ranks in (("targets", {None}), ("full,rosa", {None, 4})):
        run("shift", *how, "--methods", methods, "--lrs", "1e-2", "--output", tmp_path / methods)
        assert {row.rank for row in read_comparison(tmp_path / methods).rows} == ranks


def test_what_is_of_no_use_is_refused_before_any_training(files, world, tmp_path, capsys, cache):
    source, target = files
    short = tmp_path / "short.txt"
    short.write_text("a few words\n" * 20)
    common = ["--output", tmp_path / "runs", "--cache", tmp_path / "cache"]
    how = ["--max-length", CONTEXT]
    both = ["--source", source, "--target", target, *how]

    def refused(*arguments: object) -> str:
        message = fails(capsys, "shift", *common, *arguments)
        assert not (tmp_path / "runs").exists()
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        return message

    assert "neither for the built-in texts" in refused("--source", source)
    assert "same text" in refused("--source", source, "--target", source)
    assert "240 characters" in refused("--source", source, "--target", short, *how)
    assert "not there" in refused("--source", source, "--target", tmp_path / "none.txt")
    assert "unknown method" in refused(*both, "--methods", "rosa,galaxy")
    encoder = save_with_tokenizer(tiny_bert(), tmp_path / "bert")
    assert "no decoder" in refused(*both, "--model", encoder)
    decoder = save_with_tokenizer(tiny_gpt2(), tmp_path / "gpt2")
    assert "unknown tokens" in refused(*both, "--model", decoder)  # it knows a few words


def test_a_folder_that_is_written_to_is_left_alone(texts, world, cache, tmp_path):
    finished = world.data.parent
    with FileLock(finished / runs.LOCK):  # by one that begins to compare, as this does
        assert shift.prepare(texts, cache, CONTEXT, pretraining=SMALL) == world
    begun = tmp_path / finished.name
    begun.mkdir()
    with (
        FileLock(begun / runs.LOCK),
        pytest.raises(UserError, match="another process is preparing"),
    ):
        shift.prepare(texts, tmp_path, CONTEXT, pretraining=SMALL)
    assert [path.name for path in begun.iterdir()] == [runs.LOCK]


def test_a_stopped_pretraining_goes_on(texts, tmp_path, monkeypatch):
    train = training.train

    def stopped(settings, **how):
        train(settings, **how)
        (settings.output / runs.METRICS).unlink()  # as if it had ended after its last checkpoint
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        shift.prepare(texts, tmp_path, CONTEXT, pretraining=SMALL)
    resumed = []
    monkeypatch.setattr(
        training,
        "train",
        lambda settings, **how: resumed.append(how) or train(settings, **how),
    )
    world = shift.prepare(texts, tmp_path, CONTEXT, pretraining=SMALL)
    assert resumed == [{"resume": True}]
    assert json.loads((world.data.parent / shift.START).read_text()) == world.start


def test_pythons_own_texts_are_prose_and_code():
    prose, code = python_texts.prose_and_code()
    assert "Operator precedence" in prose
    assert code.count("\ndef ") > 1000
    assert code.count("self.") > 20 * prose.count("self.")


def test_code_has_its_docstrings_taken_out_and_nothing_else():
    source = (
        '"""Of the file."""\nx = """kept"""\n\n\ndef f(a):\n    """Of f.\n\n    More.\n    """\n'
    )
    source += "    return a  # why\n\n\nclass C:\n    '''Of C.'''\n\n    y = 1\n"
    left = python_texts._without_docstrings(source, ast.parse(source))
    assert "Of" not in left
    assert "More" not in left
    tree = ast.parse(left)
    assert [type(node).__name__ for node in tree.body] == ["Assign", "FunctionDef", "ClassDef"]
    assert "# why" in left
    assert '"""kept"""' in left
