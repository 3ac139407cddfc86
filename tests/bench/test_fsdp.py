"""torch's FSDP 2 by `rosa train`: what one process trains, in parts over two."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from transformers import AutoModelForCausalLM

from rosa.bench.setup import fsdp
from rosa.bench.setup.checking import check
from rosa.bench.setup.launched import as_launched
from rosa.bench.setup.settings import RunSettings
from rosa.errors import UserError
from tests.bench.test_averaging import (
    CHATS,
    EFFECTIVE,
    PREFERENCES,
    assert_as_whole,
    assert_same,
    settings_for,
    train,
    train_in_two,
    writing_settings,
)
from tests.processes import free_port, fsdp_on_cpus, without_gloo

pytestmark = without_gloo

SPLIT = {"batch_size": EFFECTIVE // 4, "gradient_accumulation": 2}
CASES = [
    ("classification", "rosa"),
    ("classification", "lora"),
    ("classification", "full"),
    ("classification", "head"),
    ("text", "dora"),
    *((task, "rosa") for task in ("regression", "text", "pairs", "e2e", *CHATS, *PREFERENCES)),
]


def train_in_parts(rank: int, port: int, runs: list[tuple[RunSettings, dict[str, int]]]) -> None:
    fsdp_on_cpus()
    fsdp.runs_here = lambda: True
    train_in_two(rank, port, runs)


def train_as_launched(rank: int, port: int, settings: RunSettings) -> None:
    """By what `accelerate launch` says in the place of --fsdp."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", fsdp.BLOCKS: "GPT2Block"}
    os.environ[fsdp.RESHARD] = "false"
    settings = as_launched(settings)
    assert settings.fsdp
    train_in_parts(rank, port, [(settings, SPLIT)])


def in_two(runs: list[tuple[RunSettings, dict[str, int]]]) -> None:
    multiprocessing.spawn(train_in_parts, (free_port(), runs), nprocs=2, daemon=True)


def test_it_trains_what_one_process_does(tmp_path):
    runs = []
    for task, method in CASES:
        folder = tmp_path / f"{task}-{method}"
        if task == "e2e":
            settings = writing_settings(folder)
        else:
            folder.mkdir()
            settings = settings_for(task, folder)
        settings = replace(settings, method=method, resample_every="2", output=folder / "run")
        if method == "rosa":
            settings = replace(settings, target_modules=("all-linear",), rank=2)
        runs.append((replace(settings, fsdp=True), SPLIT))
    in_two(runs)
    assert_as_whole([settings for settings, _ in runs], fsdp=False)


def test_it_does_what_accelerate_was_set_up_for(tmp_path):
    settings = replace(settings_for("text", tmp_path), resample_every="2")
    settings = replace(settings, output=tmp_path / "run")
    multiprocessing.spawn(train_as_launched, (free_port(), settings), nprocs=2, daemon=True)
    assert_as_whole([settings])


def test_it_goes_on_from_a_checkpoint(tmp_path):
    settings = replace(settings_for("pairs", tmp_path), resample_every="2", epochs=3, fsdp=True)
    settings = replace(settings, output=tmp_path / "run", on_nan="skip")
    in_two([(settings, SPLIT)])
    expected = torch.load(settings.output / "found0.pt")
    (settings.output / "metrics.json").unlink()
    checkpoints = settings.output / "checkpoints"
    shutil.rmtree(max(checkpoints.iterdir(), key=lambda p: int(p.name.split("-")[1])))
    in_two([(settings, SPLIT)])
    found = torch.load(settings.output / "found0.pt")
    for each in (found, expected):
        each["norms"] = each["norms"][-1:]
    assert_same(found, expected)


@pytest.mark.parametrize("given", [{}, {"method": "full"}, {"trained": "B", "epochs": 3}], ids=str)
def test_in_bfloat16(tmp_path, given):
    settings = replace(settings_for("pairs", tmp_path), resample_every="2", **given)
    base = AutoModelForCausalLM.from_pretrained(settings.model).to(torch.bfloat16)
    base.save_pretrained(settings.model)
    settings = replace(settings, precision="bf16", gradient_checkpointing=True, fsdp=True)
    settings = replace(settings, output=tmp_path / "run", group_by_length=True)
    in_two([(settings, SPLIT)])
    found = torch.load(settings.output / "found0.pt")
    whole = train(replace(settings, output=tmp_path / "whole", fsdp=False))["record"]
    assert found["record"] == pytest.approx(whole, rel=0.05)
    card = next(settings.output.glob("[am]*/README.md")).read_text()
    assert "FSDP" not in card
    assert "torchrun --nproc-per-node 2 -m rosa train" in card

    (settings.output / "metrics.json").unlink()
    last = max((settings.output / "checkpoints").iterdir(), key=lambda p: int(p.name[11:]))
    shutil.rmtree(last)
    in_two([(settings, SPLIT)])
    again = torch.load(settings.output / "found0.pt")
    assert again["record"] == found["record"]
    for name, weight in found["weights"].items():
        assert torch.equal(again["weights"][name], weight), name


def diverge(rank: int, port: int, settings: RunSettings) -> None:
    with pytest.raises(
        UserError, match=r"became (nan|NaN).*or go on from the last checkpoint by --resume"
    ):
        train_in_parts(rank, port, [(settings, SPLIT)])


def test_what_has_diverged_stops(tmp_path):
    settings = replace(settings_for("pairs", tmp_path), lr=1e30, output=tmp_path / "run")
    multiprocessing.spawn(
        diverge, (free_port(), replace(settings, fsdp=True)), nprocs=2, daemon=True
    )
    assert not list((settings.output / "checkpoints").glob("*/whole.json"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"deepspeed": Path("zero.json")}, "give one of them"),
        ({"method": "adalora"}, "leave --fsdp out"),
        ({"method": "galore"}, "leave --fsdp out"),
        ({"method": "lora_fa"}, "leave --fsdp out"),
        ({"method": "prompt"}, "saves a prompt by a pass"),
        ({"load_in": "4bit"}, "--load-in 4bit was not tried"),
        ({"record_changes": True}, "--record-changes"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_so_is_refused(monkeypatch, given, says):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(fsdp, "runs_here", lambda: True)
    settings = RunSettings(model="x", output=Path("y"), task="cola", fsdp=True, **given)
    with pytest.raises(UserError, match=says):
        fsdp.check_fsdp(settings)


def test_it_wants_a_launcher_and_accelerators(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = RunSettings(model="x", output=Path("y"), task="cola", fsdp=True)
    with pytest.raises(UserError, match="torchrun"):
        check(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if not torch.accelerator.is_available():
        with pytest.raises(UserError, match="needs accelerators"):
            check(settings)
