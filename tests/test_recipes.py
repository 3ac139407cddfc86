"""The recipes: each is valid, and the paper's architectures train by them for a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import RobertaConfig, RobertaForMaskedLM

from rosa import tasks
from rosa.settings import RunSettings, check
from tests.models import save_with_tokenizer, tiny_gpt2
from tests.test_cli import fails, run, write_csv
from tests.test_tasks_e2e import write as write_e2e

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid(path, tmp_path):
    values = yaml.safe_load(path.read_text())
    values["target_modules"] = tuple(values["target_modules"])
    settings = check(RunSettings(output=tmp_path, **values))
    assert settings.task in tasks.TASKS


def test_there_is_one_for_every_task_of_the_papers():
    named = {yaml.safe_load(path.read_text())["task"] for path in RECIPES.rglob("*.yaml")}
    assert named == set(tasks.TASKS) - {"demo"}


def test_robertas_path(tmp_path):
    """A random RoBERTa whose checkpoint, as the hub's, has neither pooler nor classifier."""
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    base = save_with_tokenizer(RobertaForMaskedLM(config), tmp_path / "base")
    lines = ["gj\t1\t\tthe film was fine", "gj\t0\t*\tfilm the was"] * 20
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    options = ["--recipe", RECIPES / "glue" / "cola.yaml", "--model", base, "--data", tmp_path]
    run("train", *options, "--epochs", 2, "--output", out)
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["rank"], settings["epochs"], settings["batch_size"]) == (8, 2, 32)
    assert len(json.loads((out / "adapter/adapter_config.json").read_text())["target_modules"]) == 8
    assert "matthews_correlation" in json.loads((out / "metrics.json").read_text())


def test_gpt2s_path(tmp_path):
    base = save_with_tokenizer(tiny_gpt2(), tmp_path / "base")
    write_e2e(tmp_path)
    options = ["--recipe", RECIPES / "e2e" / "gpt2.yaml", "--model", base, "--data", tmp_path]
    run("train", *options, "--epochs", 2, "--limit-test", 2, "--output", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "bleu" in record
    assert record["resamples"] == 2


def test_bad_recipes_are_refused(tmp_path, capsys):
    path, files = tmp_path / "r.yaml", ["--train", write_csv(tmp_path / "t.csv")]
    command = ["train", "--recipe", path, "--model", "x", *files, "--output", tmp_path / "out"]
    assert "is not there" in fails(capsys, *command)
    path.write_text("epoch: 3")
    assert "'epoch' is no option of this command" in fails(capsys, *command)
    path.write_text("epochs: [3")
    assert "is not YAML" in fails(capsys, *command)
    path.write_text("epochs: many")
    assert "as a number" in fails(capsys, *command)
