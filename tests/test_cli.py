"""The commands as a user runs them, on tiny models and real files."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rosa import cli
from tests.models import WORDS, save_with_tokenizer, tiny_bert, tiny_gpt2


def run(*arguments: object) -> None:
    """The console entry point; SystemExit(0) is a success."""
    sys.argv = ["rosa", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise


def fails(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in message
    return message


def review(good: bool) -> str:
    words = random.choices(WORDS[8:], k=4)
    return " ".join([*words, random.choice(["good", "fine"] if good else ["bad", "poor"])])


def write_csv(path: Path, rows: int = 60, labels: tuple[str, str] = ("no", "yes")) -> Path:
    lines = [f"{review(bool(i % 2))},{labels[i % 2]}" for i in range(rows)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_with_tokenizer(tiny_bert(), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def basics(encoder, tmp_path):
    return ["--model", encoder, "--train", write_csv(tmp_path / "t.csv"), "--rank", 2]


QUICK = ["--epochs", 2, "--batch-size", 8, "--lr", 0.01]


@pytest.mark.parametrize("method", ["rosa", "lora", "full", "head"])
def test_a_run_of_each_method(basics, tmp_path, method, capsys):
    out = tmp_path / "run"
    run("train", *basics, *QUICK, "--method", method, "--output", out)
    assert "accuracy" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["accuracy"] <= 1
    assert all(isinstance(v, (int, float, str)) for v in metrics.values())
    history = json.loads((out / "history.json").read_text())
    assert metrics["train_loss"] == history["epochs"][1]["train_loss"]
    assert [e["epoch"] for e in history["epochs"]] == [1, 2]
    assert metrics["resamples"] == (1 if method == "rosa" else 0)
    assert json.loads((out / "settings.json").read_text())["method"] == method
    place = out / ("adapter" if method in ("rosa", "lora") else "model")
    assert (place / "README.md").read_text().startswith("---")
    assert (place / "tokenizer.json").exists()


def test_the_same_seed_gives_the_same_run(basics, tmp_path):
    records = []
    for name in ("one", "two"):
        run("train", *basics, *QUICK, "--seed", 3, "--output", tmp_path / name)
        records.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-6)
    assert records[0]["eval_loss"] == pytest.approx(records[1]["eval_loss"], rel=1e-6)


def test_an_interrupted_run_is_resumed_as_if_it_had_not_been(basics, tmp_path, monkeypatch, capsys):
    run("train", *basics, *QUICK, "--epochs", 3, "--output", tmp_path / "whole")
    from transformers import Trainer

    save, out = Trainer._save_checkpoint, tmp_path / "parts"

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("train", *basics, *QUICK, "--epochs", 3, "--output", out)
    assert not (out / "metrics.json").exists()
    monkeypatch.undo()
    assert "not finished" in fails(
        capsys, "export", out, "--to", "lora", "--output", tmp_path / "x"
    )
    run("train", *basics, *QUICK, "--epochs", 3, "--output", out, "--resume")
    one, two = (
        load_file(d / "adapter/adapter_model.safetensors") for d in (tmp_path / "whole", out)
    )
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4, msg=key)
    capsys.readouterr()
    run("train", *basics, *QUICK, "--epochs", 3, "--output", out, "--resume")
    assert "is finished: nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["merged", "lora"])
@pytest.mark.parametrize("which", ["run", "adapter"])
def test_exports_agree_with_the_trained_model(basics, encoder, tmp_path, form, which, capsys):
    out, place = tmp_path / "run", tmp_path / "export"
    run("train", *basics, *QUICK, "--output", out)
    folder = out if which == "run" else out / "adapter"
    run("export", folder, "--to", form, "--output", place)
    assert "largest difference of logits" in capsys.readouterr().out
    ids = torch.randint(len(WORDS), (3, 6))
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    trained = PeftModel.from_pretrained(base, str(out / "adapter"))
    expected = trained(ids).logits
    if form == "merged":
        written = AutoModelForSequenceClassification.from_pretrained(place)
        assert written.config.id2label == {0: "no", 1: "yes"}
    else:
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        written = PeftModel.from_pretrained(base, str(place))
    torch.testing.assert_close(written.eval()(ids).logits, expected, rtol=0, atol=1e-4)
    again = fails(capsys, "export", folder, "--to", form, "--output", place)
    assert "is not empty: name a new folder" in again


def test_evaluating_a_run_and_its_exports_gives_its_metrics(basics, tmp_path, capsys):
    out, train = tmp_path / "run", basics[3]
    run("train", *basics, *QUICK, "--validation", train, "--output", out)
    metrics = json.loads((out / "metrics.json").read_text())
    for form in ("merged", "lora"):
        run("export", out, "--to", form, "--output", tmp_path / form)
    for folder in (out, out / "adapter", tmp_path / "merged", tmp_path / "lora"):
        capsys.readouterr()
        run("evaluate", folder, "--validation", train)
        assert f"{metrics['accuracy']:.4f}" in capsys.readouterr().out


def test_pairs_of_texts_and_json_lines(encoder, tmp_path):
    rows = [{"one": review(True), "two": review(bool(i % 2)), "same": i % 2} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = ["--text-column", "one", "--text-column", "two", "--label-column", "same"]
    out = tmp_path / "run"
    run("train", "--model", encoder, "--train", path, *columns, *QUICK, "--output", out)
    assert "accuracy" in json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("form", ["text", "pairs"])
def test_a_decoder_on_text_and_on_prompts_with_completions(decoder, tmp_path, form):
    if form == "text":
        path = tmp_path / "t.txt"
        path.write_text("\n\n".join(review(True) for _ in range(40)))
    else:
        path = tmp_path / "t.jsonl"
        rows = [{"prompt": "the film was", "completion": "very good"} for _ in range(40)]
        path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    run("train", "--model", decoder, "--train", path, *QUICK, "--output", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["perplexity"] == pytest.approx(
        torch.tensor(metrics["loss"]).exp().item(), rel=1e-5
    )
    run("export", out, "--to", "merged", "--output", tmp_path / "plain")


def test_the_cola_task_reads_the_raw_release(encoder, tmp_path):
    folder = tmp_path / "cola"
    folder.mkdir()
    for name in ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"):
        lines = [f'x\t{i % 2}\t\t"{review(bool(i % 2))}' for i in range(20)]
        (folder / name).write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    run("train", "--model", encoder, "--task", "cola", "--data", folder, *QUICK, "--output", out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert -1 <= metrics["matthews_correlation"] <= 1
    assert (metrics["train_examples"], metrics["validation_examples"]) == (20, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        ("", "is empty"),
        ("text,kind\ngood,1\n", "has no column 'label'; there are: text, kind"),
        ("text,label\ngood,1\nbad,1\n", "has one label only (1)"),
        ("text,label\n,1\nbad,0\n", "row 1 has nothing in column 'text'"),
        ("text,label\ngood,1\nbad,0\n", "too few rows to split a validation set off"),
    ],
)
def test_bad_training_files(encoder, tmp_path, capsys, content, message):
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_text(content)
    out = tmp_path / "run"
    assert message in fails(capsys, "train", "--model", encoder, "--train", path, "--output", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 0], "rank must be a positive integer, got 0"),
        (["--rank", -2], "rank must be a positive integer, got -2"),
        (["--rank", "many"], "Invalid value for '--rank'"),
        (["--method", "loraa"], "unknown method 'loraa'; there are: rosa, lora, full, head"),
        (["--directions", "up"], "directions must be one of svd, orthonormal"),
        (["--resample-every", "often"], "resample_every must be epoch, never"),
        (["--target-modules", "qurey"], "Did you mean query"),
        (["--task", "mnli"], "give a task by name or a training file of your own, not both"),
        (["--lr", 0], "lr must be positive"),
        (["--precision", "int8"], "precision must be one of auto, fp32, bf16"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--validation", "nowhere.csv"], "nowhere.csv is not there"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_settings(basics, tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in fails(capsys, "train", *basics, "--output", out, *arguments)
    assert not out.exists()


def test_an_output_folder_in_use_is_not_touched(basics, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", *basics, *QUICK, "--output", out)
    before = (out / "metrics.json").read_text()
    assert "already holds a run" in fails(capsys, "train", *basics, *QUICK, "--output", out)
    other = [*basics, *QUICK, "--seed", 5, "--output", out]
    assert "seed (0 there, 5 here)" in fails(capsys, "train", *other, "--resume")
    assert (out / "metrics.json").read_text() == before
    run("train", *other, "--overwrite")
    assert (out / "metrics.json").read_text() != before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for flag in ("--overwrite", "--resume"):
        assert "not a run's" in fails(capsys, "train", *basics, "--output", mine, flag)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_damaged_adapter_is_a_clear_error(basics, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", *basics, *QUICK, "--output", out)
    path = out / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    message = fails(capsys, "export", out, "--to", "lora", "--output", tmp_path / "x")
    assert "damaged or cut short" in message
    assert "neither a run nor an adapter" in fails(
        capsys, "export", tmp_path, "--to", "lora", "--output", tmp_path / "x"
    )
