"""The recipes: the paper's hold what the paper says, ours rosa's defaults, and both train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from transformers import GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

from rosa import RosaCallback, RosaConfig
from rosa.bench import tasks
from rosa.bench.setup.checking import check, schedule
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.bench.tasks.e2e import prompt
from rosa.bench.train import generation
from tests.helpers import fails, run, write_csv, write_e2e
from tests.models import save_with_tokenizer, tiny_gpt2

RECIPES = Path(__file__).parents[2] / "recipes"
EVERY = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))
PAPERS = [name for name in EVERY if name.startswith("paper/")]
OURS = [name for name in EVERY if name not in PAPERS]

# What the paper (arXiv 2407.07802) says of its experiments; its recipes name every one of these.
# The optimizer, the head, the prompts and the beam search are no settings: see the runs below.
DRAWS = {
    "directions": "svd",
    "resample_every": "epoch",
    "moments": "clear",
}
COMMON = {"method": "rosa", "target_modules": ("attention",), "warmup": 0.06, **DRAWS}
OF_BENCHMARK = {"glue": {"rank": 8, "epochs": 10.0}, "e2e": {"rank": 4, "epochs": 5.0}}
# What the paper's method does not have. A recipe leaves it out: no default may bring it in.
ABSENT = {
    "alpha": None,
    "weight_decay": 0.0,
    "gradient_accumulation": 1,
    "limit_train": None,
    "hold_out": False,
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / name).read_text())


@pytest.fixture
def settings_by(monkeypatch, tmp_path):
    """The settings that `rosa train` would run a recipe with."""

    def of(name: str) -> RunSettings:
        taken = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "rosa.bench.train.training.train",
                lambda settings, **_: taken.append(settings) or MagicMock(),
            )
            run("train", "--recipe", RECIPES / name, "--output", tmp_path / "run")
        return check(taken[0])

    return of


def config_of(settings: RunSettings) -> RosaConfig:
    config = find_method(settings.method).config(settings, settings.rank, {}, ())
    assert isinstance(config, RosaConfig)
    return config


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_of_the_papers_has_its_settings(name, settings_by):
    wanted = {**COMMON, **OF_BENCHMARK[name.split("/")[1]]}
    assert set(wanted) <= set(read(name))
    settings = settings_by(name)
    found = {key: getattr(settings, key) for key in (*wanted, *ABSENT)}
    assert found == {**wanted, **ABSENT}

    config = config_of(settings)
    assert (config.r, config.alpha or config.r) == (wanted["rank"], wanted["rank"])
    assert config.directions == "svd"
    assert (config.rosa_dropout, config.bias) == (0, "none")
    assert not config.rank_pattern
    assert not config.alpha_pattern
    callback = schedule(settings)
    assert (callback.every, callback.moments) == ("epoch", "clear")


@pytest.mark.parametrize("name", OURS)
def test_a_recipe_of_ours_differs_by_what_is_drawn_and_when(name, settings_by):
    papers = read(f"paper/{name}")
    same = {key: value for key, value in papers.items() if key not in DRAWS}
    assert read(name) == {**same, "resample_every": "auto"}
    settings = settings_by(name)
    config, default = config_of(settings), RosaConfig()
    assert config.directions == default.directions
    assert config.is_informed
    assert vars(schedule(settings)) == vars(RosaCallback())


def test_there_are_two_for_every_task_of_the_papers():
    assert [f"paper/{name}" for name in OURS] == PAPERS
    papers = {*tasks.GLUE_TASKS, *tasks.SUPER_GLUE_TASKS, "e2e"}
    assert {read(name)["task"] for name in PAPERS} == papers
    for name in EVERY:
        kind, stem = name.split("/")[-2:]
        assert stem == f"{read(name)['model' if kind == 'e2e' else 'task']}.yaml"
        assert (RECIPES / name).read_text().startswith("# "), "it says what it is"


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of the runs, with their callbacks."""
    from rosa.bench.train import training

    built, build = [], training.build_trainer

    def keep(*arguments):
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(training, "build_trainer", keep)
    return built


def check_training(trainer: Any) -> None:
    """AdamW, and a rate that falls linearly after 6 % of warm-up."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(optimizer) is torch.optim.AdamW
    assert trainer.args.lr_scheduler_type == "linear"
    assert trainer.args.get_warmup_steps(1000) == 60


def trained(trainer: Any) -> set[str]:
    """The parameters that are trained, without the names that PEFT puts before and after."""
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {name.removeprefix("base_model.model.").replace(".default", "") for name in names}


@pytest.mark.parametrize("name", ["glue/cola.yaml", "paper/glue/cola.yaml"])
def test_robertas_path(name, tmp_path, trainers):
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
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    options = ["--recipe", RECIPES / name, "--model", base, "--data", tmp_path]
    run("train", *options, "--epochs", 2, "--output", out)
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["rank"], settings["epochs"], settings["batch_size"]) == (8, 2, 32)
    assert len(json.loads((out / "adapter/adapter_config.json").read_text())["target_modules"]) == 8
    assert "matthews_correlation" in json.loads((out / "metrics.json").read_text())

    ((trainer, callback),) = trainers
    check_training(trainer)
    layers = [f"roberta.encoder.layer.{i}.attention." for i in range(2)]
    projections = ["self.query", "self.key", "self.value", "output.dense"]
    factors = {
        f"{layer}{projection}.rosa_{factor}"
        for layer in layers
        for projection in projections
        for factor in "AB"
    }
    head = {
        f"classifier.modules_to_save.{part}.{kind}"
        for part in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }
    assert trained(trainer) == factors | head
    if name in PAPERS:  # two epochs of two steps: one draw, as the second begins
        assert (callback.period, callback.drawn_at) == (2, [2])


@pytest.mark.parametrize("name", ["e2e/gpt2.yaml", "paper/e2e/gpt2.yaml"])
def test_gpt2s_path(name, tmp_path, trainers, monkeypatch):
    generate, asked = GPT2LMHeadModel.generate, []

    def keep(*arguments, **options):
        asked.append(options)
        return generate(*arguments, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", keep)
    rule, lengths = generation._no_repeats, []
    monkeypatch.setattr(generation, "_no_repeats", lambda n, _: lengths.append(n) or rule(n, _))
    base = save_with_tokenizer(tiny_gpt2(), tmp_path / "base")
    write_e2e(tmp_path)
    options = ["--recipe", RECIPES / name, "--model", base, "--data", tmp_path]
    run("train", *options, "--epochs", 2, "--limit-test", 2, "--output", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "bleu" in record

    ((trainer, _),) = trainers
    check_training(trainer)
    layers = [f"transformer.h.{i}.attn." for i in range(2)]
    assert trained(trainer) == {
        f"{layer}{part}.rosa_{factor}"
        for layer in layers
        for part in ("c_attn", "c_proj")
        for factor in "AB"
    }
    assert {(o["num_beams"], o["do_sample"]) for o in asked} == {(5, False)}
    assert set(lengths) == {4}
    assert all(len(o["logits_processor"]) == 1 for o in asked)
    texts = json.loads((tmp_path / "run" / "predictions.json").read_text())["texts"]
    assert {text["prompt"] for text in texts} < {
        prompt(f"name[P{i}], food[soup]") for i in range(20)
    }
    assert prompt("name[P0]") == "Input: name[P0] Output:"
    if name in PAPERS:  # two epochs: one draw, as the second begins
        assert record["resamples"] == 1


@pytest.mark.parametrize("name", EVERY)
def test_a_recipe_is_compared_with_lora(name, settings_by, monkeypatch, tmp_path):
    settings, taken = settings_by(name), []
    monkeypatch.setattr(
        "rosa.bench.grid.compare.compare",
        lambda base, grid, *_, **__: taken.append((base, grid)) or {},
    )
    monkeypatch.setattr("rosa.bench.report.writing.write_report", lambda *_: None)
    run("compare", "--recipe", RECIPES / name, "--output", tmp_path / "cmp")
    base, grid = taken[0]
    assert [variant.method for variant in grid.variants] == ["rosa", "lora"]
    assert grid.ranks == (settings.rank,)
    cell = replace(base, method="rosa", rank=settings.rank, **grid.variants[0].options)
    same = {"output": settings.output, "record_changes": False, "lr": settings.lr}
    assert check(replace(cell, **same)) == settings


def test_bad_recipes_are_refused(tmp_path, capsys):
    path, files = tmp_path / "r.yaml", ["--train", write_csv(tmp_path / "t.csv")]
    command = ["train", "--recipe", path, "--model", "x", *files, "--output", tmp_path / "out"]
    assert "is not there" in fails(capsys, *command)
    path.write_text("epoch: 3")
    assert "not among the options of this command: 'epoch'" in fails(capsys, *command)
    path.write_text("epochs: [3")
    assert "is not YAML" in fails(capsys, *command)
    path.write_text("epochs: many")
    assert "as a number" in fails(capsys, *command)
