"""Frozen weights in fewer bits, from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.helpers import fails, run, write_csv
from tests.models import save_with_tokenizer, tiny_bert

QUICK = ["--steps", 6, "--batch-size", 8, "--rank", 2, "--max-length", 16]


@pytest.fixture
def basics(tmp_path):
    """A model whose layers are wide enough for groups of 64 numbers, and a table."""
    base = save_with_tokenizer(tiny_bert(width=64), tmp_path / "base")
    table = write_csv(tmp_path / "reviews.csv")
    return ["--model", base, "--train", table, "--validation", table]


@pytest.mark.parametrize("load_in", ["4bit", "8bit", "hqq"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_a_run_in_fewer_bits_is_evaluated_as_it_was_and_exported(
    basics, tmp_path, load_in, targets, capsys
):
    if load_in == "8bit" and targets == "attention":
        pytest.skip("as the others: one is enough")
    out, table = tmp_path / "run", basics[3]
    how = ["--load-in", load_in, "--target-modules", targets, "--output", out]
    run("train", *basics, *QUICK, *how, "--resample-every", 2)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["resamples"] > 0
    for folder in (out, out / "adapter"):
        capsys.readouterr()
        run("evaluate", folder, "--validation", table)
        shown = capsys.readouterr().out
        assert f"{metrics['accuracy']:.4f}" in shown
        assert f"{metrics['eval_loss']:.4f}" in shown
    run("export", out, "--to", "merged", "--output", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert all(p.dtype == torch.float32 for p in merged.parameters())  # the whole weights
    run("export", out, "--to", "lora", "--output", tmp_path / "lora")


def test_lora_trains_so_too(basics, tmp_path):
    how = ["--method", "lora", "--load-in", "hqq", "--target-modules", "all-linear"]
    run("train", *basics, *QUICK, *how, "--output", tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_is_refused_before_anything_is_loaded(basics, tmp_path, capsys, monkeypatch):
    out = ["--output", tmp_path / "run"]
    assert "must be one of full, 8bit" in fails(capsys, "train", *basics, *out, "--load-in", "2bit")
    message = fails(capsys, "train", *basics, *out, "--load-in", "4bit", "--method", "full")
    assert "method full trains the weights: it needs load_in full" in message
    monkeypatch.setattr("rosa.bench.setup.quantizing.find_spec", lambda name: None)
    message = fails(capsys, "train", *basics, *out, "--load-in", "4bit")
    assert "needs bitsandbytes: pip install 'rosa-finetune[quantized]'" in message
    assert not (tmp_path / "run").exists()
