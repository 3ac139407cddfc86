"""Reading a user's own files: every value as it stands, every fault named before work starts."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rosa.bench import tasks
from rosa.bench.tasks.files import read_columns, read_table
from rosa.bench.tasks.task import DataSettings
from rosa.bench.train.evaluating import _named_as_before

BOM = "\ufeff"


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def csv_of(folder: Path, labels: list[str], name: str = "t.csv") -> Path:
    rows = [f"text {i},{label}" for i, label in enumerate(labels)]
    return write(folder, name, "\n".join(["text,label", *rows]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n007,01\n"a, ""b""\nc",NA\n'),
        ("a.CSV", BOM + 'text,label\r\n007,01\r\n"a, ""b""\nc",NA\r\n'),
        ("a.csv", 'text;label\n007;01\n"a, ""b""\nc";NA\n'),
        ("a.csv", BOM + 'text\tlabel\r\n007\t01\r\n"a, ""b""\nc"\tNA\r\n'),
        ("a.csv", BOM + 'sep=;\r\ntext;label\r\n007;01\r\n"a, ""b""\nc";NA\r\n'),
        ("a.csv", '"label";"text";"more, or less"\n01;007;1\nNA;"a, ""b""\nc";2\n'),
        ("a.tsv", 'text\tlabel\n007\t01\n"a, ""b""\nc"\tNA\n'),
        ("a.jsonl", '{"text":"007","label":"01"}\n\n{"text":"a, \\"b\\"\\nc","label":"NA"}\n'),
        ("a.json", BOM + '[{"text":"007","label":"01"},{"text":"a, \\"b\\"\\nc","label":"NA"}]'),
    ],
)
def test_values_stay_the_text_that_they_are(tmp_path, name, content):
    rows = read_table(write(tmp_path, name, content), ("text", "label"))
    assert rows["text"][:] == ["007", 'a, "b"\nc']
    assert rows["label"][:] == ["01", "NA"]


def test_a_lone_quotation_mark_in_tsv_swallows_no_lines(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"hello\t1\nb\t0\nc"\t1\nd\t0\n')
    assert read_table(path, ("text",))["text"][:] == ['"hello', "b", 'c"', "d"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [("one\ntwo\nthree\n", ["one", "two", "three"]), ("one\ntwo\n \nthree", ["one\ntwo", "three"])],
)
def test_plain_text_is_paragraphs_or_else_lines(tmp_path, content, texts):
    assert read_table(write(tmp_path, "a.txt", content), ("text",))["text"][:] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\n  ,1\nb,0\n", "row 1 has nothing in column 'text'"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,label,label\na,1,0\n", "has two columns of the name 'label'"),
        ("a.tsv", "text\tother\tlabel\tother\na\tb\t1\tc\n", "has two columns of the name"),
        ("a.csv", " \n", "is empty"),
        ("a.csv", "text,label\na,1\nb,0,9\n", "row 2 has 3 cells, the header has 2"),
        ("a.csv", 'text,label\n"a,1\nb,0\n', "cannot be read"),
        ("a.xlsx", "x", "unknown kind of file; use .csv, .tsv"),
        ("a.jsonl", '{"text":"a","label":1}\n{"text"\n', "line 2"),
        ("a.jsonl", "1\n2\n", "row 1 is no object of columns with values"),
        ("a.jsonl", '{"text":"a","label":null}\n', "row 1 has nothing in column 'label'"),
        ("a.jsonl", '{"text":NaN,"label":1}\n', "row 1 has nothing in column 'text'"),
        ("a.jsonl", '{"text":"a \\ud800","label":1}\n', "row 1 has half of a character"),
        ("a.jsonl", '{"text":' + "[" * 100_000 + "\n", "cannot be read as JSON"),
        ("a.jsonl", '{"text":["a"],"label":1}\n', "row 1 has no plain text in column 'text'"),
        ("a.jsonl", '{"words":"a","kind":1}\n', "no column 'text'; there are: words, kind"),
    ],
)
def test_a_faulty_file_is_named_with_its_fault(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=path.name) as caught:
        read_table(path, ("text", "label"))
    assert message in str(caught.value)


def test_parquet_is_read_as_the_same_rows_in_json_are(tmp_path):
    rows = [
        {"text": "good", "label": 1, "note": None, "messages": [{"role": "user", "content": "a"}]},
        {"text": "b\u00e4d", "label": 0, "note": "x", "messages": []},
    ]
    lines = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    path = tmp_path / "a.parquet"
    assert read_columns(path) == read_columns(lines)
    assert read_table(path, ("text", "label")).to_dict() == (
        read_table(lines, ("text", "label")).to_dict()
    )
    for column, message in (("note", "row 1 has nothing"), ("words", "no column 'words'; there")):
        with pytest.raises(ValueError, match=message):
            read_table(path, (column,))


@pytest.mark.parametrize("content", [b"", b"text,label", b"PAR1" + b"x" * 30 + b"PAR1"])
def test_a_file_that_is_no_parquet_is_named_with_its_fault(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet: "):
        read_table(path, ("text",))
    with pytest.raises(FileNotFoundError, match=r"b\.parquet is not there"):
        read_table(tmp_path / "b.parquet", ("text",))
    with pytest.raises(ValueError, match="is a folder: give its files"):
        read_table(tmp_path, ("text",))


def test_text_in_another_encoding_is_a_clear_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        read_table(path, ("text",))


def test_a_split_off_validation_set_keeps_the_shares_of_the_labels(tmp_path):
    labels = ["no"] * 300 + ["yes"] * 100
    random.shuffle(labels)
    settings = DataSettings(train=csv_of(tmp_path, labels), seed=random.randrange(100))
    task = tasks.load(settings, decoder=False)
    assert task.labels == ("no", "yes")
    assert (len(task.train), len(task.validation)) == (360, 40)
    assert sum(task.validation["label"]) == 10
    assert not set(task.train["text0"]) & set(task.validation["text0"])
    again = tasks.load(settings, decoder=False)
    assert again.validation["text0"][:] == task.validation["text0"][:]


def test_labels_are_numbered_alike_whatever_the_type_in_the_file(tmp_path):
    train = write(
        tmp_path,
        "t.jsonl",
        "\n".join(json.dumps({"text": str(i), "label": i % 3}) for i in range(30)),
    )
    validation = csv_of(tmp_path, ["2.0", " 0.0", "1 "])
    task = tasks.load(DataSettings(train=train, validation=validation), decoder=False)
    assert task.labels == ("0", "1", "2")
    assert task.validation["label"][:] == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "validation", "message"),
    [
        (["x"] * 9, None, "one label only"),
        (["x", "x ", " x"] * 9, None, "one label only"),
        (["x", "y"] * 9, ["x", "z"], "labels that are not learned: z"),
        (["x"] * 9 + ["y"], None, "too few rows to hold some out for validation: 10"),
        ([str(i / 8) for i in range(40)], None, "each of the 40 labels needs two at least"),
    ],
)
def test_labels_of_no_use(tmp_path, labels, validation, message):
    settings = DataSettings(
        train=csv_of(tmp_path, labels),
        validation=csv_of(tmp_path, validation, "v.csv") if validation else None,
    )
    with pytest.raises(ValueError, match=message):
        tasks.load(settings, decoder=False)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["Yes", "yes", "no"], "'Yes' and 'yes' are learned as 2 labels"),
        (["good", "very bad", "Very  bad"], "'very bad' and 'Very  bad' are learned as 2"),
        (["yes", "no"], ""),
    ],
)
def test_labels_that_are_nearly_one_are_told_of(tmp_path, capsys, labels, told):
    task = tasks.load(DataSettings(train=csv_of(tmp_path, labels * 9)), decoder=False)
    assert len(task.labels) == len(labels)
    said = capsys.readouterr()
    assert (told in said.out + said.err) if told else "learned as" not in said.out + said.err


def test_an_evaluation_looks_for_the_columns_of_the_run():
    before = {"text_columns": ["a", "b"], "label_column": "kind"}
    found = _named_as_before(DataSettings(), before)
    assert (found.text_columns, found.label_column) == (("a", "b"), "kind")
    given = DataSettings(text_columns=("c",), label_column="sort")
    assert _named_as_before(given, before) == given
    assert _named_as_before(DataSettings(), {}) == DataSettings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DataSettings(), "no data"),
        (DataSettings(train=Path("t.csv"), text_columns=("label",)), "name one column twice"),
        (DataSettings(task="colour"), "unknown task 'colour'; there are: cola, sst2"),
        (DataSettings(task="cola", train=Path("t.csv")), "not both"),
        (DataSettings(task="cola", validation=Path("v.csv")), "its own validation data"),
        (DataSettings(train=Path("t.csv"), data=Path()), "name the task with --task"),
        (DataSettings(train=Path("t.csv"), limit_train=0), "limit_train must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(settings, decoder=False)


def test_of_a_file_sorted_by_label_a_limited_test_has_every_label(tmp_path):
    train = csv_of(tmp_path, ["a", "b"] * 40, "train.csv")
    validation = csv_of(tmp_path, ["a"] * 40 + ["b"] * 40, "validation.csv")
    limited = [
        tasks.load(
            DataSettings(
                train=train, validation=validation, hold_out=True, limit_test=20, seed=seed
            ),
            decoder=False,
        ).test["text0"][:]
        for seed in (0, 1)
    ]
    assert limited[0] == limited[1]
    assert len(limited[0]) == 20
    assert 4 < sum(int(text.removeprefix("text ")) < 40 for text in limited[0]) < 16


@pytest.mark.parametrize("decoder", [False, True])
def test_what_is_chosen_and_reported_on_is_the_same_for_every_seed(tmp_path, decoder):
    rows = [{"text": f"text {i}", "label": f"{i % 2}"} for i in range(100)]
    columns = ["text"] if decoder else ["text", "label"]
    text = "\n".join(json.dumps({name: row[name] for name in columns}) for row in rows)
    path = write(tmp_path, "t.jsonl", text)

    def texts(part: Any) -> list[str]:
        return part["text" if decoder else "text0"][:]

    found = [
        tasks.load(DataSettings(train=path, hold_out=True, seed=seed), decoder) for seed in (0, 1)
    ]
    for task in found:
        parts = [texts(each) for each in (task.train, task.validation, task.test)]
        assert sorted(itertools.chain(*parts)) == sorted(row["text"] for row in rows)
    for part in ("train", "validation", "test"):
        assert texts(getattr(found[0], part)) == texts(getattr(found[1], part))
