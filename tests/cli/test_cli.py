"""The commands as a user runs them, on tiny models and real files."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    NystromformerConfig,
    NystromformerForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rosa.bench.grid.cell import MODELS
from rosa.bench.setup.checking import RESAMPLED
from rosa.bench.setup.methods import METHODS
from rosa.bench.setup.settings import RunSettings
from tests.helpers import fails, review, run, write_csv
from tests.models import WORDS, needs_packages, save_with_tokenizer, tiny_bert, tiny_gpt2


def breaks(capsys, *arguments: object) -> str:
    """What a bug looks like: its trace, what to do with it, and another exit code."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "Traceback" in message
    assert "bug in rosa" in message
    assert "report it" in message
    return message


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_with_tokenizer(tiny_bert(), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return save_with_tokenizer(tiny_gpt2(), tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def basics(encoder, tmp_path):
    return ["--model", encoder, "--train", write_csv(tmp_path / "t.csv")]


SHORT = ["--epochs", 2, "--batch-size", 8, "--lr", 0.01]
QUICK = [*SHORT, "--resample-every", "epoch"]


def quick(method: str) -> list[object]:
    return [*(QUICK if method in RESAMPLED else SHORT), "--method", method]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method(basics, encoder, tmp_path, method, capsys, monkeypatch):
    needs_packages(method)
    out = tmp_path / "run"
    rank = ["--rank", 2] if METHODS[method].has_rank else []
    run("train", *basics, *quick(method), *rank, "--output", out)
    assert "accuracy" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["accuracy"] <= 1
    assert all(isinstance(v, (int, float, str)) for v in metrics.values())
    history = json.loads((out / "history.json").read_text())
    assert metrics["train_loss"] == history["epochs"][1]["train_loss"]
    assert [e["epoch"] for e in history["epochs"]] == [1, 2]
    assert metrics["resamples"] == {"rosa": 2, "relora": 1}.get(method, 0)
    assert json.loads((out / "settings.json").read_text())["method"] == method
    place = out / ("adapter" if METHODS[method].config else "model")
    card = (place / "README.md").read_text()
    assert card.startswith("---")
    code = card.split("```python\n")[1].split("```")[0].replace(f'"{encoder.name}"', "encoder")
    found: dict[str, Any] = {"encoder": encoder}
    monkeypatch.chdir(place)  # where the card lies
    exec(code, found)
    assert found["model"].config.num_labels == 2
    assert (place / "tokenizer.json").exists()


def test_it_says_which_steps_model_is_kept(basics, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", *basics, "--epochs", 3, "--batch-size", 8, "--lr", 0.01, "--output", out)
    history = json.loads((out / "history.json").read_text())
    best = max(history["epochs"], key=lambda epoch: epoch["eval_accuracy"])  # the first of equals
    assert history["kept_step"] == best["step"]
    last = history["epochs"][-1]["step"]
    said = f"the model of step {best['step']} of {last} is kept" in capsys.readouterr().out
    assert said == (best["step"] != last)


def evaluated(capsys, folder: Path, validation: Path) -> tuple[float, float]:
    """The loss and the accuracy that are printed."""
    capsys.readouterr()
    run("evaluate", folder, "--validation", validation)
    printed = capsys.readouterr().out
    assert "time" not in printed
    loss, accuracy = re.findall(r"(?:eval_loss|accuracy) +│ ([0-9.]+)", printed)
    return float(loss), float(accuracy)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_is_loaded(basics, tmp_path, capsys, method, precision):
    needs_packages(method)
    out, data = tmp_path / "run", basics[3]
    how = ["--validation", data, "--precision", precision, "--output", out, "--lr", 0.02]
    run("train", *basics, *quick(method), *how)
    metrics = json.loads((out / "metrics.json").read_text())
    expected = metrics["eval_loss"], metrics["accuracy"]
    rounding = 2e-4 if precision == "fp32" else 2e-2
    row = rounding if precision == "fp32" else 0.051  # one of the twenty, of two classes alike
    has_loss = method != "adalora"  # which adds to it what depends on the ranks that it had
    found = evaluated(capsys, out, data)
    assert found[1] == pytest.approx(expected[1], abs=row)
    assert not has_loss or found[0] == pytest.approx(expected[0], abs=rounding)
    if METHODS[method].config is None:
        return
    merged = ["export", out, "--to", "merged", "--output", tmp_path / "merged"]
    if method in ("prompt", "ptuning", "prefix"):
        assert "a trained prompt, which changes no weight" in fails(capsys, *merged)
    elif precision == "fp32":
        run(*merged)
        found = evaluated(capsys, tmp_path / "merged", data)
        assert found[1] == pytest.approx(expected[1], abs=rounding)
        assert not has_loss or found[0] == pytest.approx(expected[0], abs=rounding)


@pytest.mark.parametrize("method", ["lora_ga", "adalora", "ptuning"])
def test_what_cannot_be_gone_on_with_is_refused(basics, tmp_path, capsys, method):
    out = tmp_path / "run"
    how = [*basics, *quick(method), "--output", out]
    run("train", *how)
    (out / "metrics.json").unlink()
    checkpoint = next(out.glob("checkpoints/*"))
    if method == "lora_ga":
        run("train", *how, "--resume")
        (out / "metrics.json").unlink()
        other = [*how, "--resume", "--batch-size", 4, "--gradient-accumulation", 2]
        assert "holds a run with other settings" in fails(capsys, "train", *other)
        message = fails(capsys, "evaluate", checkpoint, "--validation", basics[3])
        assert "fits the base that its training changed" in message
    else:
        message = fails(capsys, "train", *how, "--resume")
        assert f"{method} cannot be resumed" in message
        run("train", *how[:-1], tmp_path / "new", "--resume")  # nothing there: it begins
        run("train", *how[:-1], tmp_path / "new", "--resume")  # finished
        evaluated(capsys, checkpoint, basics[3])
        # In a comparison it begins again.
        settings = RunSettings(
            model=str(basics[1]), output=out, train=basics[3], epochs=1, method=method
        )
        assert MODELS.train(settings, method, lambda share: None).epochs == 1


def test_the_same_seed_gives_the_same_run(basics, tmp_path):
    records = []
    for name in ("one", "two"):
        run("train", *basics, *QUICK, "--seed", 3, "--output", tmp_path / name)
        records.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-6)
    assert records[0]["eval_loss"] == pytest.approx(records[1]["eval_loss"], rel=1e-6)


def test_lora_fa_trains_b_alone(basics, tmp_path):
    numbers = {}
    for method in ("lora", "lora_fa", "head"):
        out = tmp_path / method
        run("train", *basics, *quick(method), "--output", out)
        numbers[method] = json.loads((out / "metrics.json").read_text())["trainable_parameters"]
    factors = load_file(tmp_path / "lora_fa" / "adapter" / "adapter_model.safetensors")
    b = [values for key, values in factors.items() if "lora_B" in key]
    assert all(values.any() for values in b)
    assert numbers["lora_fa"] - numbers["head"] == sum(values.numel() for values in b)
    assert numbers["lora_fa"] < numbers["lora"]


def products(adapter: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors, each pair of factors multiplied: signs of singular vectors are free."""
    found = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in found if key.endswith("A")]:
        found[key] = found.pop(key[:-1] + "B") @ found[key]
    return found


@pytest.mark.parametrize(("method", "draws"), [("rosa", 2), ("lora_fa", 0)])
def test_an_interrupted_run_is_resumed_as_if_it_had_not_been(
    basics, tmp_path, monkeypatch, capsys, method, draws
):
    # Informed draws of two runs that differ by rounding can part, where two directions hold about
    # the same of the gradient; that such runs resume is tested with the callback.
    how = [*quick(method), "--epochs", 3, "--record-changes"]
    how += ["--directions", "svd"] if method == "rosa" else []
    run("train", *basics, *how, "--output", tmp_path / "whole")
    from transformers import Trainer

    save, out = Trainer._save_checkpoint, tmp_path / "parts"

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("train", *basics, *how, "--output", out)
    assert not (out / "metrics.json").exists()
    monkeypatch.undo()
    assert "not finished" in fails(
        capsys, "export", out, "--to", "lora", "--output", tmp_path / "x"
    )
    (out / "checkpoints" / "checkpoint-99").mkdir()  # a save that was cut off
    run("train", *basics, *how, "--output", out, "--resume")
    assert json.loads((out / "metrics.json").read_text())["resamples"] == draws
    histories = [json.loads((f / "history.json").read_text()) for f in (tmp_path / "whole", out)]
    assert [len(h["changes"]["epochs"]) for h in histories] == [3, 3]
    assert [len(h["epochs"]) for h in histories] == [3, 3]
    one, two = (products(folder / "adapter") for folder in (tmp_path / "whole", out))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4, msg=key)
    capsys.readouterr()
    run("train", *basics, *how, "--output", out, "--resume")
    assert "is finished: nothing to resume" in capsys.readouterr().out
    settings = json.loads((out / "settings.json").read_text())  # one that is no more is no matter
    (out / "settings.json").write_text(json.dumps({**settings, "split": "B"}))
    run("train", *basics, *how, "--output", out, "--resume")
    assert "is finished: nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["merged", "weight by weight", "lora"])
@pytest.mark.parametrize("which", ["run", "adapter"])
def test_exports_agree_with_the_trained_model(basics, encoder, tmp_path, form, which, capsys):
    out, place = tmp_path / "run", tmp_path / "export"
    run("train", *basics, *QUICK, "--output", out)
    folder = out if which == "run" else out / "adapter"
    if form == "weight by weight":
        form = "merged"
        how = ["--low-memory", "--max-shard-size", "20KB"]
        run("export", folder, "--to", form, "--output", place, *how)
        assert "every weight was loaded back and compared" in capsys.readouterr().out
        assert len(list(place.glob("model-*-of-*.safetensors"))) > 1
        assert (place / "tokenizer_config.json").is_file()
    else:
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
        # transformers finds the base of an adapter's folder, where no config.json is in it
        by_name = AutoModelForSequenceClassification.from_pretrained(place)
        torch.testing.assert_close(by_name.eval()(ids).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(written.eval()(ids).logits, expected, rtol=0, atol=1e-4)
    again = fails(capsys, "export", folder, "--to", form, "--output", place)
    assert "is not empty: name a new folder" in again


def test_merging_weight_by_weight_refuses_what_it_cannot_do(basics, tmp_path, capsys):
    out, place = tmp_path / "run", tmp_path / "export"
    run("train", *basics, *quick("lora"), "--output", out)
    how = ["export", out, "--output", place]
    message = fails(capsys, *how, "--to", "merged", "--low-memory")
    assert "--low-memory merges ROSA adapters" in message
    assert "holds one of LORA's" in message
    message = fails(capsys, *how, "--to", "lora", "--low-memory")
    assert "--low-memory and --max-shard-size are for --to merged" in message
    message = fails(capsys, *how, "--to", "merged", "--max-shard-size", "five")
    assert "is a size as 500MB or 5GB, got 'five'" in message
    run("export", out, "--to", "merged", "--output", tmp_path / "plain")
    message = fails(
        capsys, "export", tmp_path / "plain", *how[2:], "--to", "merged", "--low-memory"
    )
    assert "there is no adapter to export" in message
    assert not place.exists()


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


@pytest.mark.parametrize("method", ["rosa", "lora", "full"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_checkpoint_is_evaluated_and_exported_as_a_run_is(
    encoder, decoder, tmp_path, capsys, kind, method, monkeypatch
):
    train, out = write_csv(tmp_path / "t.csv"), tmp_path / "run"
    if kind == "decoder":
        train = (tmp_path / "t.txt").resolve()
        train.write_text("\n".join(" ".join(random.choices(WORDS[8:], k=12)) for _ in range(40)))
    files = ["--train", train, "--validation", train, "--max-length", 10, "--output", out]
    run("train", "--model", encoder if kind == "encoder" else decoder, *files, *quick(method))
    (out / "metrics.json").unlink()  # as if it were being trained
    history = json.loads((out / "history.json").read_text())
    checkpoints = sorted(out.glob("checkpoints/*"), key=lambda p: int(p.name[11:]))
    assert len(checkpoints) == 2
    for row, folder in zip(history["epochs"], checkpoints, strict=True):
        forms = [folder]
        if method != "full":
            run("export", folder, "--to", "merged", "--output", tmp_path / f"{folder.name}-plain")
            forms.append(tmp_path / f"{folder.name}-plain")
        for form in forms:
            capsys.readouterr()
            run("evaluate", form, "--validation", train, "--max-length", 10)
            found = re.search(r"eval_loss +│ ([0-9.]+)", capsys.readouterr().out)
            assert float(found[1]) == pytest.approx(row["eval_loss"], abs=2e-4)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run("evaluate", Path("..", "run", "checkpoints", folder.name), "--validation", train)
    printed = re.search(r"eval_loss +│ ([0-9.]+)", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(row["eval_loss"], abs=2e-4)  # of as short texts
    assert "or name one of its checkpoints" in fails(capsys, "evaluate", out, "--validation", train)


@pytest.mark.parametrize("method", ["rosa", "lora", "head"])
def test_layers_that_the_checkpoint_lacks_are_trained_and_saved(tmp_path, method, capsys):
    """A masked language model has no pooler: the classifier's is new, and random."""
    base = save_with_tokenizer(BertForMaskedLM(tiny_bert().config), tmp_path / "base")
    train, out = write_csv(tmp_path / "t.csv"), tmp_path / "run"
    files = ["--train", train, "--validation", train]
    run("train", "--model", base, *files, *quick(method), "--output", out)
    metrics = json.loads((out / "metrics.json").read_text())
    folders = [out]
    if method != "head":
        run("export", out, "--to", "merged", "--output", tmp_path / "merged")
        folders.append(tmp_path / "merged")
    for folder in folders:
        capsys.readouterr()
        run("evaluate", folder, "--validation", train)
        assert f"{metrics['eval_loss']:.4f}" in capsys.readouterr().out
        assert not (folder / "checkpoints").exists() or folder == out


def test_evaluating_reads_as_much_of_a_text_as_the_run_did(encoder, tmp_path, capsys):
    train, out = tmp_path / "t.csv", tmp_path / "run"
    rows = [f"{' '.join(random.choices(WORDS[8:], k=12))},{i % 2}" for i in range(40)]
    train.write_text("\n".join(["text,label", *rows]))
    files = ["--train", train, "--validation", train, "--max-length", 8]
    run("train", "--model", encoder, *files, *QUICK, "--rank", 2, "--output", out)
    loss = f"{json.loads((out / 'metrics.json').read_text())['eval_loss']:.4f}"
    for folder in (out, out / "adapter"):
        capsys.readouterr()
        run("evaluate", folder, "--validation", train)
        assert loss in capsys.readouterr().out
    run("evaluate", out, "--validation", train, "--max-length", 16)
    assert loss not in capsys.readouterr().out


def test_a_head_for_other_labels_is_replaced(tmp_path, capsys):
    base = save_with_tokenizer(tiny_bert(labels=5), tmp_path / "base")
    train, out = write_csv(tmp_path / "t.csv"), tmp_path / "run"
    run("train", "--model", base, "--train", train, "--validation", train, *QUICK, "--output", out)
    loss = json.loads((out / "metrics.json").read_text())["eval_loss"]
    capsys.readouterr()
    run("evaluate", out, "--validation", train)
    assert f"{loss:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["rosa", "full"])
def test_bf16_on_any_hardware_trains_float32_weights(decoder, tmp_path, method):
    base = save_with_tokenizer(tiny_gpt2().to(torch.bfloat16), tmp_path / "base")
    path, out = tmp_path / "t.txt", tmp_path / "run"
    path.write_text("\n".join(review(True) for _ in range(40)))
    options = ["--precision", "bf16", *quick(method)]
    run("train", "--model", base, "--train", path, *options, "--output", out)
    weights = load_file(next(out.glob("[am]*/*.safetensors")))
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}


def test_texts_longer_than_the_model_reads_are_cut(encoder, decoder, tmp_path, capsys):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(" ".join(random.choices(WORDS, k=60)) for _ in range(20)))
    run("train", "--model", decoder, "--train", path, *QUICK, "--output", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "the model reads 32 tokens at most" in printed
    assert "18 of 18 training texts reach 32 tokens" in printed


def test_a_lora_run_can_be_merged_too(basics, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", *basics, *quick("lora"), "--output", out)
    run("export", out, "--to", "merged", "--output", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()
    message = fails(capsys, "export", out, "--to", "lora", "--output", tmp_path / "x")
    assert "not a ROSA adapter" in message


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
        ("text,label\ngood,1\nbad,0\n", "too few rows to hold some out"),
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
        (["--method", "loraa"], "unknown method 'loraa'; there are: rosa, lora, lora_fa, rslora"),
        (["--directions", "up"], "directions must be one of svd, orthonormal"),
        (["--resample-every", "often"], "resample_every must be auto, epoch, never"),
        (["--target-modules", "qurey"], "Did you mean query"),
        (["--target-modules", "query,value"], "one name an option: --target-modules query"),
        (["--task", "mnli"], "give a task by name or a training file of your own, not both"),
        (["--lr", 0], "lr must be positive"),
        (["--weight-decay", -1], "weight_decay must not be negative"),
        (["--seed", -1], "seed must be from 0"),
        (["--precision", "int8"], "precision must be one of auto, fp32, bf16"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--validation", "nowhere.csv"], "nowhere.csv is not there"),
        (["--model", "no/such/folder"], "no/such/folder is neither a folder nor a hub id"),
    ],
)
def test_bad_settings(basics, tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in fails(capsys, "train", *basics, "--output", out, *arguments)
    assert not out.exists()


@pytest.mark.parametrize("typed", [["--trained", "B"], ["--resample-every", "epoch"]])
def test_rosas_settings_are_refused_for_another_method(basics, tmp_path, capsys, typed):
    message = f"{typed[0]}: {typed[0][2:].replace('-', '_')} is ROSA's, and means nothing to method"
    out = ["--output", tmp_path / "run", "--dry-run"]
    assert message in fails(capsys, "train", *basics, "--method", "lora", *typed, *out)
    assert message in fails(capsys, "plan", *basics[:2], "--method", "full", *typed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{typed[0][2:]}: {typed[1]}\nmethod: lora\n")
    assert message in fails(capsys, "train", *basics, "--recipe", recipe, *out)
    recipe.write_text(
        f"{typed[0][2:]}: {typed[1]}\n"
    )  # of ROSA's recipe, LoRA is run with the rest
    run("train", *basics, "--recipe", recipe, "--method", "lora", *out)
    run("train", *basics, *typed, *out)


def test_a_rank_for_a_method_without_one_is_refused(basics, tmp_path, capsys):
    options = ["--method", "full", "--rank", 4, "--output", tmp_path / "run"]
    assert "method full has no rank: leave --rank out" in fails(capsys, "train", *basics, *options)


def test_a_model_without_a_tokenizer_is_refused(tmp_path, capsys):
    tiny_bert().save_pretrained(tmp_path / "base")
    files = ["--train", write_csv(tmp_path / "t.csv"), "--output", tmp_path / "run"]
    assert "has no tokenizer" in fails(capsys, "train", "--model", tmp_path / "base", *files)


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
    (mine / "settings.json").write_text('{"editor.tabSize": 4}')  # an editor's, not a run's
    (mine / "model").mkdir()
    assert "not a run's" in fails(capsys, "train", *basics, "--output", mine, "--overwrite")
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert (mine / "model").is_dir()


def test_a_damaged_adapter_is_a_clear_error(basics, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", *basics, *QUICK, "--output", out)
    path = out / "adapter" / "adapter_model.safetensors"
    whole, export = path.read_bytes(), ["export", out, "--to", "lora", "--output", tmp_path / "x"]
    by_weight = ["export", out, "--to", "merged", "--low-memory", "--output", tmp_path / "x"]
    path.write_bytes(whole[:-64])
    assert "damaged or cut short" in fails(capsys, *export)
    assert "damaged or cut short" in fails(capsys, *by_weight)
    save_file({"foreign": torch.zeros(2)}, path)
    assert "of another adapter" in fails(capsys, *export)
    assert "of another adapter" in fails(capsys, *by_weight)
    path.unlink()
    assert "has no adapter_model.safetensors" in fails(capsys, *export)
    path.write_bytes(whole)
    (path.parent / "adapter_config.json").write_text("{cut")
    assert "adapter_config.json is not valid JSON" in fails(capsys, *export)
    assert "neither a run nor an adapter" in fails(
        capsys, "export", tmp_path, "--to", "lora", "--output", tmp_path / "x"
    )


def broken_model(kind: str, good: Path, folder: Path) -> Path:
    """A model's folder that cannot be used, each in another way."""
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config cut short":
        (folder / "config.json").write_text('{"model_type": "be')
    elif kind == "config is a list":
        (folder / "config.json").write_text("[1, 2]")
    elif kind == "unknown kind of model":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bort9"}))
    elif kind == "no kind of model":
        del config["model_type"]
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "size of the wrong type":
        (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    elif kind == "heads that do not divide":
        (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    elif kind == "broken tokenizer":
        (folder / "tokenizer.json").write_text('{"version": ')
    elif kind == "tokenizer of another form":
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 5}')
    elif kind == "weights cut short":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        *("no config", "config cut short", "config is a list", "unknown kind of model"),
        *("no kind of model", "size of the wrong type", "heads that do not divide"),
        *("broken tokenizer", "tokenizer of another form", "weights cut short", "no weights"),
    ],
)
def test_a_broken_model_is_the_users_to_mend(encoder, tmp_path, kind, capsys):
    model = broken_model(kind, encoder, tmp_path / "base")
    files = ["--train", write_csv(tmp_path / "t.csv"), "--output", tmp_path / "run"]
    message = fails(capsys, "train", "--model", model, *files)
    assert str(model) in message or "weights file is damaged" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to(basics, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    run_in_a_file = fails(capsys, "train", *basics, "--output", tmp_path / "file" / "run")
    assert str(tmp_path / "file") in run_in_a_file

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Permission denied" in fails(capsys, "train", *basics, "--output", tmp_path / "run")


@pytest.mark.parametrize("method", ["rosa", "lora", "ia3"])
def test_layers_that_cannot_be_adapted(basics, tmp_path, method, capsys):
    how = ["--method", method, "--output", tmp_path / "run"]
    if method == "ia3":  # it knows its layers by the kind of model
        model = save_with_tokenizer(tiny_nystromformer(), tmp_path / "base")
        assert "ia3 cannot be put into" in fails(capsys, "train", *basics, *how, "--model", model)
    else:
        message = fails(capsys, "train", *basics, *how, "--target-modules", "nowhere")
        assert "--target-modules nowhere" in message
    assert not (tmp_path / "run").exists()


def tiny_nystromformer() -> PreTrainedModel:
    config = NystromformerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return NystromformerForSequenceClassification(config)


def test_running_out_of_memory_says_what_takes_less(basics, tmp_path, capsys, monkeypatch):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        MemoryError(),
    ):

        def exhaust(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("transformers.Trainer.training_step", exhaust)
        out = ["--output", tmp_path / "run", "--overwrite"]
        message = fails(capsys, "train", *basics, *out)
        assert "lower --batch-size" in message


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_that_diverges_says_so(basics, tmp_path, capsys, accumulation):
    how = ["--method", "full", "--lr", 1e30, "--gradient-accumulation", accumulation]
    message = fails(capsys, "train", *basics, *SHORT[:4], *how, "--output", tmp_path / "run")
    assert "diverged" in message
    assert "--lr" in message
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("method", ["rosa", "full"])
def test_layers_computed_again_learn_the_same(decoder, tmp_path, method):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": review(True)}) + "\n" for _ in "a" * 40)
    )
    how = ["train", "--model", decoder, "--train", tmp_path / "t.jsonl", *quick(method)]
    how += ["--rank", 2] if method == "rosa" else []
    losses = []
    for more in ([], ["--gradient-checkpointing"]):
        out = tmp_path / f"run{len(more)}"
        run(*how, "--output", out, *more)
        losses.append(json.loads((out / "metrics.json").read_text())["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("method", ["rosa", "full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_text_of_nan_is_placed_and_its_steps_are_skipped_by_choice(
    tmp_path, capsys, recwarn, method, accumulation
):
    model = tiny_bert()
    place = model.bert.embeddings.word_embeddings
    base = save_with_tokenizer(model, tmp_path / "base")
    with torch.no_grad():
        place.weight[WORDS.index("[UNK]")] = float("nan")
    model.save_pretrained(base)
    data = write_csv(tmp_path / "t.csv", rows=80)
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0], "awful bad,no", *lines[1:]]))
    how = ["--model", base, "--train", data, "--validation", write_csv(tmp_path / "v.csv")]
    how += ["--batch-size", 4, "--epochs", 2, "--method", method, "--lr", 1e-3]
    how += ["--gradient-accumulation", accumulation]
    message = fails(capsys, "train", *how, "--output", tmp_path / "stopped")
    assert "in the output of" in message
    assert "word_embeddings" in message
    assert "--on-nan skip" in message
    run("train", *how, "--on-nan", "skip", "--output", tmp_path / "run")
    skipped = [w for w in recwarn if "the step is skipped" in str(w.message)]
    assert len(skipped) == 2  # once an epoch
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] >= 20


BUGS = [TypeError, RuntimeError, KeyError, ValueError, AttributeError, IndexError, AssertionError]


@pytest.mark.parametrize("error", BUGS)
@pytest.mark.parametrize(
    "place",
    [
        "rosa.bench.train.preparing.load_base",
        "rosa.bench.train.preparing.tokenize",
        "rosa.bench.train.building.find_targets",
        "rosa.model.RosaModel._create_and_replace",
        "rosa.bench.train.training.build_trainer",
        "rosa.bench.train.training.save_trained",
        "rosa.bench.report.tables.metrics_table",
    ],
)
def test_a_bug_is_told_from_a_mistake_of_the_user(
    basics, tmp_path, capsys, monkeypatch, error, place
):
    def stumble(*args, **kwargs):
        raise error("an inner part does not hold")

    monkeypatch.setattr(place, stumble)
    message = breaks(capsys, "train", *basics, *QUICK, "--output", tmp_path / "run")
    assert "an inner part does not hold" in message


def test_a_missing_package_is_named_and_a_wrong_import_of_ours_is_a_bug(
    basics, tmp_path, capsys, monkeypatch
):
    out = ["--output", tmp_path / "run"]
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    message = fails(capsys, "train", *basics, *out)
    assert "sklearn" in message
    assert "pip install 'rosa-finetune[cli]'" in message
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "rosa.bench.tokens.reading", None)
    monkeypatch.setitem(sys.modules, "rosa.bench.train.training", None)
    breaks(capsys, "train", *basics, *out)


def test_an_interrupt_says_how_to_go_on(basics, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.training_step", interrupt)
    with pytest.raises(SystemExit) as stop:
        run("train", *basics, *QUICK, "--output", tmp_path / "run")
    assert stop.value.code == 130
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "Traceback" not in message


def test_roberta_reads_two_tokens_fewer_than_it_has_places(tmp_path, capsys):
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=34,
    )
    base = save_with_tokenizer(RobertaForSequenceClassification(config), tmp_path / "base")
    lines = [f"{' '.join(random.choices(WORDS[4:], k=50))},{i % 2}" for i in range(30)]
    train, out = tmp_path / "t.csv", tmp_path / "run"
    train.write_text("\n".join(["text,label", *lines]))
    run("train", "--model", base, "--train", train, *quick("lora"), "--output", out)
    assert "the model reads 32 tokens at most" in capsys.readouterr().out
    run("evaluate", out, "--validation", train, "--max-length", 64)
    assert "the model reads 32 tokens at most" in capsys.readouterr().out


def test_the_module_is_the_command(tmp_path):
    for module in ("rosa", "rosa.cli"):
        command = [sys.executable, "-m", module, "report", str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 2
        assert "is not a comparison's folder" in " ".join(found.stderr.split())


@pytest.mark.parametrize("command", ["compare", "report", "export", "synthetic", "demo"])
def test_commands_for_one_process_are_refused_in_several(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {
        "compare": ["--model", "m", "--output", tmp_path / "x"],
        "report": [tmp_path],
        "export": [tmp_path, "--to", "lora", "--output", tmp_path / "x"],
    }
    message = fails(capsys, command, *options.get(command, []))
    assert f"rosa {command} is for one process" in message
    assert not list(tmp_path.iterdir())


def test_a_second_file_is_not_ignored(basics, tmp_path, capsys):
    other = write_csv(tmp_path / "other.csv")
    for again in (["--train", other], [f"--train={other}"]):
        said = fails(capsys, "train", *basics, *again, "--output", tmp_path / "run")
        assert "--train was given more than once" in said


def test_a_decoder_does_not_ignore_labels_without_a_word(decoder, tmp_path, capsys):
    table = write_csv(tmp_path / "t.csv")
    how = ("train", "--model", decoder, "--train", table, "--output", tmp_path / "run", *SHORT)
    assert "--label-column is for models that" in fails(capsys, *how, "--label-column", "text")
    run(*how)
    assert "the column label is left out: to classify" in " ".join(capsys.readouterr().out.split())
