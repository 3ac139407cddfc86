"""GLUE and SuperGLUE: the benchmark's own file forms, and its metrics."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest

from rosa.bench import tasks
from rosa.bench.tasks import load
from rosa.bench.tasks.glue import DIAGNOSTICS, TASKS
from rosa.bench.tasks.metrics import (
    accuracy_and_f1,
    accuracy_and_macro_f1,
    matthews_and_accuracy,
    pearson_and_spearman,
)
from rosa.bench.tasks.task import DataSettings
from tests.helpers import review, run
from tests.models import save_with_tokenizer, tiny_bert

COLA = Path(os.environ.get("ROSA_COLA", Path(__file__).parents[3] / "shared/data/cola"))

# A header and two rows of each TSV file, as in the benchmark's archive.
TSV = {
    "cola": (None, ["gj04", "1", "", 'He said "no.'], ["gj04", "0", "*", "He said no the."]),
    "sst2": (["sentence", "label"], ["a fine film", "1"], ["a bad film", "0"]),
    "mrpc": (
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["1", "7", "8", "One.", "The one."],
        ["0", "9", "6", "Two.", "Three."],
    ),
    "stsb": (
        ["index", "genre", "filename", "sentence1", "sentence2", "score"],
        ["0", "news", "f", "A cat.", "One cat.", "4.750"],
        ["1", "news", "f", "A cat.", "A dog.", "1.2"],
    ),
    "qqp": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["0", "1", "2", "Why?", "Why so?", "1"],
        ["1", "3", "4", "Who?", "When?", "0"],
    ),
    "mnli": (
        ["index", "genre", "sentence1", "sentence2", "label1", "gold_label"],
        ["0", "fiction", "It rains.", "It is wet.", "neutral", "entailment"],
        ["1", "fiction", "It rains.", "It is dry.", "neutral", "contradiction"],
    ),
    "qnli": (
        ["index", "question", "sentence", "label"],
        ["0", "Where?", "There.", "entailment"],
        ["1", "Where?", "Then.", "not_entailment"],
    ),
    "rte": (
        ["index", "sentence1", "sentence2", "label"],
        ["0", "It rains.", "It is wet.", "entailment"],
        ["1", "It rains.", "It is dry.", "not_entailment"],
    ),
    "wnli": (
        ["index", "sentence1", "sentence2", "label"],
        ["0", "It rains.", "It is wet.", "1"],
        ["1", "It rains.", "It is dry.", "0"],
    ),
}
JSON = {
    "boolq": [
        {"question": "is it", "passage": "It is.", "label": True, "idx": 0},
        {"question": "was it", "passage": "No.", "label": False, "idx": 1},
    ],
    "cb": [
        {"premise": "P", "hypothesis": "H", "label": "contradiction", "idx": 0},
        {"premise": "P", "hypothesis": "G", "label": "neutral", "idx": 1},
    ],
    "wic": [
        {"word": "bank", "sentence1": "A.", "sentence2": "B.", "label": False, "start1": 0},
        {"word": "bank", "sentence1": "A.", "sentence2": "C.", "label": True, "start1": 0},
    ],
}
EXPECTED = {
    "cola": [('He said "no.', 1), ("He said no the.", 0)],
    "sst2": [("a fine film", 1), ("a bad film", 0)],
    "mrpc": [("One.", "The one.", 1), ("Two.", "Three.", 0)],
    "stsb": [("A cat.", "One cat.", 4.75), ("A cat.", "A dog.", 1.2)],
    "qqp": [("Why?", "Why so?", 1), ("Who?", "When?", 0)],
    "mnli": [("It rains.", "It is wet.", 0), ("It rains.", "It is dry.", 2)],
    "qnli": [("Where?", "There.", 0), ("Where?", "Then.", 1)],
    "rte": [("It rains.", "It is wet.", 0), ("It rains.", "It is dry.", 1)],
    "wnli": [("It rains.", "It is wet.", 1), ("It rains.", "It is dry.", 0)],
    "boolq": [("is it", "It is.", 1), ("was it", "No.", 0)],
    "cb": [("P", "H", 1), ("P", "G", 2)],
    "wic": [("bank: A.", "B.", 0), ("bank: A.", "C.", 1)],
}


def write(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[name]
    for source in (task.train, task.validation, *(s for _, s in task.more)):
        if name in TSV:
            lines = ["\t".join(row) for row in TSV[name] if row]
        else:
            lines = [json.dumps(row) for row in JSON[name]]
        (folder / source.file).write_text("\n".join(lines) + "\n")


def rows(dataset) -> list[tuple]:
    return [tuple(row.values()) for row in dataset]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("nested", [False, True])
def test_the_benchmarks_own_files(tmp_path, name, nested):
    write(tmp_path / TASKS[name].folder if nested else tmp_path, name)
    task = load(DataSettings(task=name, data=tmp_path), decoder=False)
    assert rows(task.train) == rows(task.validation) == EXPECTED[name]
    assert task.text_columns == tuple(f"text{i}" for i in range(len(EXPECTED[name][0]) - 1))
    assert (task.kind == "regression") == (name == "stsb")
    assert [*task.more] == (["mismatched"] if name == "mnli" else [])


def test_every_task_can_be_named():
    assert set(tasks.TASKS) == {*TASKS, *DIAGNOSTICS, "e2e", "corpus", "demo"}


@pytest.mark.parametrize(("name", "folder"), [("axb", "AX-b"), ("axg", "AX-g")])
def test_the_diagnostic_sets_are_tested_after_training_on_rte(tmp_path, name, folder):
    entailment = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}
    (tmp_path / "RTE").mkdir()
    for file in ("train.jsonl", "val.jsonl"):
        (tmp_path / "RTE" / file).write_text(json.dumps(entailment))
    row = {"premise": "A", "hypothesis": "B", "sentence1": "A", "sentence2": "B"}
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f"{folder}.jsonl").write_text(
        json.dumps({**row, "label": "not_entailment"})
    )
    task = load(DataSettings(task=name, data=tmp_path), decoder=False)
    assert rows(task.train) == [("It rains.", "It is wet.", 0)]
    assert rows(task.test) == [("A", "B", 1)]


@pytest.mark.parametrize(("name", "column"), [("mnli", "premise"), ("mrpc", "sentence1")])
def test_the_hubs_columns(monkeypatch, name, column):
    """The hub itself is out of reach here: what `load_dataset` gives is in its columns."""
    columns = TASKS[name].hub_columns
    assert columns[0] == column
    asked = []

    def hub(repository, config, split):
        asked.append((repository, config, split))
        return datasets.Dataset.from_dict({columns[1]: ["b"], "label": [1], columns[0]: ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    task = load(DataSettings(task=name), decoder=False)
    assert rows(task.validation) == [("a", "b", 1)]
    assert asked[0] == ("nyu-mll/glue", name, "train")


def test_a_task_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    def hub(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(FileNotFoundError, match=r"SST-2 could not be had from the hub.*--data"):
        load(DataSettings(task="sst2"), decoder=False)
    with pytest.raises(FileNotFoundError, match=r"train\.tsv is not there"):
        load(DataSettings(task="sst2", data=tmp_path), decoder=False)
    write(tmp_path, "sst2")
    (tmp_path / "dev.tsv").write_text("text\tlabel\nfine\t1\n")
    with pytest.raises(ValueError, match="no column 'sentence'; there are: text, label"):
        load(DataSettings(task="sst2", data=tmp_path), decoder=False)
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\tgood\n")
    with pytest.raises(ValueError, match=r"'good' is no label \(expected negative, positive"):
        load(DataSettings(task="sst2", data=tmp_path), decoder=False)


def test_a_few_broken_rows_are_left_out_and_many_refused(tmp_path, capsys):
    write(tmp_path, "sst2")
    whole = "sentence\tlabel\n" + "fine\t1\n" * 200
    (tmp_path / "train.tsv").write_text(whole + "broken\n")
    task = load(DataSettings(task="sst2", data=tmp_path), decoder=False)
    assert len(task.train) == 200
    assert "1 broken rows are left out" in capsys.readouterr().out
    (tmp_path / "train.tsv").write_text(whole + "broken\n" * 20)
    with pytest.raises(ValueError, match="20 of 220 rows do not have the 2 cells"):
        load(DataSettings(task="sst2", data=tmp_path), decoder=False)


@pytest.mark.skipif(not COLA.is_dir(), reason="CoLA's raw release is not here (ROSA_COLA)")
def test_colas_raw_release():
    task = load(DataSettings(task="cola", data=COLA), decoder=False)
    assert len(task.train) == 8551
    assert len(task.validation) == 1043
    assert set(task.train["label"]) == {0, 1}


def test_metrics():
    predicted, labels = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert accuracy_and_f1(predicted, labels) == pytest.approx({"accuracy": 0.75, "f1": 0.8})
    macro = accuracy_and_macro_f1(predicted, labels)
    assert macro == pytest.approx({"accuracy": 0.75, "f1": (2 / 3 + 4 / 5) / 2})
    expected = {"matthews_correlation": 2 / (2 * 2 * 3 * 1) ** 0.5, "accuracy": 0.75}
    assert matthews_and_accuracy(predicted, labels) == pytest.approx(expected)
    numbers = pearson_and_spearman(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert numbers == pytest.approx({"pearson": 3 / (2 * 14 / 3) ** 0.5, "spearman": 1.0})


def test_undefined_correlations_count_as_zero_and_say_so_once(capsys):
    constant, labels = np.array([1, 1, 1]), np.array([0, 1, 1])
    for _ in range(2):
        assert matthews_and_accuracy(constant, labels)["matthews_correlation"] == 0
        assert pearson_and_spearman(constant * 1.0, labels * 1.0) == {"pearson": 0, "spearman": 0}
    printed = capsys.readouterr().out
    assert printed.count("Matthews correlation is undefined") <= 1
    assert printed.count("their correlation is undefined") == 1


def test_a_regression_and_a_task_with_two_validation_sets_train(tmp_path):
    base = save_with_tokenizer(tiny_bert(), tmp_path / "base")
    quick = ["--epochs", 1, "--batch-size", 8, "--rank", 2]
    header = TSV["stsb"][0]
    lines = [
        "\t".join(["0", "g", "f", review(i % 2 == 0), review(True), f"{i % 5}.5"])
        for i in range(24)
    ]
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_text("\n".join(["\t".join(header), *lines]) + "\n")
    out = tmp_path / "stsb"
    run("train", "--model", base, "--task", "stsb", "--data", tmp_path, *quick, "--output", out)
    record = json.loads((out / "metrics.json").read_text())
    assert -1 <= record["pearson"] <= 1
    run("evaluate", out, "--task", "stsb", "--data", tmp_path)
    write(tmp_path / "MNLI", "mnli")
    data, out = tmp_path / "MNLI", tmp_path / "mnli"
    run("train", "--model", base, "--task", "mnli", "--data", data, *quick, "--output", out)
    record = json.loads((out / "metrics.json").read_text())
    assert 0 <= record["mismatched_accuracy"] <= 1
