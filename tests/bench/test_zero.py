"""DeepSpeed's ZeRO by `rosa train`: what data-parallel processes train, in parts."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rosa.bench.setup.checking import check
from rosa.bench.setup.settings import RunSettings
from rosa.bench.train.building import load_base
from rosa.bench.train.preparing import load_task
from rosa.errors import UserError
from tests.bench.test_averaging import (
    CHATS,
    EFFECTIVE,
    PREFERENCES,
    assert_as_whole,
    assert_same,
    settings_for,
    train_in_two,
    writing_settings,
)
from tests.processes import free_port, without_gloo

pytest.importorskip("deepspeed")
pytestmark = [
    without_gloo,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles on the CPU"),
]
ZEROS: dict[str, dict[str, Any]] = {
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
CASES = [
    ("text", "lora"),
    *(("classification", method) for method in ("rosa", "lora", "head")),
    *((task, "rosa") for task in ("regression", "text", "pairs", "e2e", *CHATS, *PREFERENCES)),
]
STAGE_2 = {"zero_optimization": {"stage": 2}}
SPLIT = {"batch_size": EFFECTIVE // 4, "gradient_accumulation": 2}


def with_config(settings: RunSettings, zero: dict[str, Any]) -> RunSettings:
    config = settings.output.with_suffix(".deepspeed")
    config.write_text(json.dumps({"zero_optimization": zero}))
    return replace(settings, deepspeed=config)


def in_two(runs: list[tuple[RunSettings, dict[str, int]]]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    multiprocessing.spawn(train_in_two, (free_port(), runs), nprocs=2, daemon=True)


@pytest.mark.parametrize("zero", ZEROS)
def test_zero_trains_what_one_process_does(tmp_path, zero):
    runs = []
    for task, method in [*CASES, *([("pairs", "prompt")] if zero == "stage 2" else [])]:
        folder = tmp_path / f"{task}-{method}"
        if task == "e2e":
            settings = writing_settings(folder)
        else:
            folder.mkdir()
            settings = settings_for(task, folder)
        settings = replace(settings, method=method, resample_every="2", output=folder / "run")
        if method == "rosa":
            settings = replace(settings, target_modules=("all-linear",), rank=2)
        runs.append((with_config(settings, ZEROS[zero]), SPLIT))
    in_two(runs)
    assert_as_whole([settings for settings, _ in runs], deepspeed=None)


@pytest.mark.parametrize("zero", ZEROS)
def test_zero_goes_on_from_a_checkpoint(tmp_path, zero):
    settings = replace(settings_for("classification", tmp_path), resample_every="2", epochs=3)
    settings = with_config(replace(settings, output=tmp_path / "run"), ZEROS[zero])
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


def load_two(rank: int, port: int, settings: RunSettings) -> None:
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= {**sizes, **ranks, "MASTER_ADDR": "127.0.0.1"}
    base = load_base(settings, load_task(settings), None)
    assert not any(parameter.numel() for parameter in base.model.parameters())
    assert not is_deepspeed_zero3_enabled()  # the next model is whole again
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    torch.distributed.destroy_process_group()


def test_in_stage_3_a_decoder_is_cut_as_it_is_loaded(tmp_path):
    os.environ["DS_ACCELERATOR"] = "cpu"
    settings = settings_for("text", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(settings.model).to(torch.bfloat16)
    base.save_pretrained(settings.model)
    settings = with_config(replace(settings, precision="bf16"), ZEROS["stage 3"])
    config = {**json.loads(settings.deepspeed.read_text()), "train_batch_size": "auto"}
    settings.deepspeed.write_text(json.dumps(config))
    multiprocessing.spawn(load_two, (free_port(), settings), nprocs=2, daemon=True)


def diverge(rank: int, port: int, settings: RunSettings) -> None:
    with pytest.raises(
        UserError, match=r"became (nan|NaN).*or go on from the last checkpoint by --resume$"
    ):
        train_in_two(rank, port, [(settings, SPLIT)])


@pytest.mark.parametrize("zero", ZEROS)
def test_what_has_diverged_stops(tmp_path, zero):
    settings = replace(settings_for("pairs", tmp_path), lr=1e30, output=tmp_path / "run")
    os.environ["DS_ACCELERATOR"] = "cpu"
    settings = with_config(settings, ZEROS[zero])
    multiprocessing.spawn(diverge, (free_port(), settings), nprocs=2, daemon=True)
    assert not list((settings.output / "checkpoints").glob("*/whole.json"))


@pytest.mark.parametrize(
    ("config", "given", "says"),
    [
        ({"zero_optimization": {"stage": 7}}, {}, "stage"),
        ({**STAGE_2, "optimizer": {"type": "AdamW"}}, {}, "leave optimizer out: --lr"),
        ({**STAGE_2, "train_micro_batch_size_per_gpu": 3}, {}, "--batch-size says"),
        ({**STAGE_2, "bf16": {"enabled": True}}, {}, "--precision says"),
        ([1], {}, "JSON object"),
        ({"amp": {"enabled": True}}, {}, "leave amp out"),
        ({"zero_optmization": {"stage": 2}}, {}, "leave zero_optmization out"),
        ({}, {}, "lacks ZeRO's part"),
        ({"zero_optimization": 3}, {}, "lacks ZeRO's part"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            {},
            "leave round_robin_gradients out",
        ),
        (STAGE_2, {"method": "adalora"}, "leave --deepspeed out"),
        (STAGE_2, {"method": "lora_fa"}, "leave --deepspeed out"),
        ({"zero_optimization": {"stage": 3}}, {"method": "prompt"}, "choose stage 2"),
        (STAGE_2, {"on_nan": "skip"}, "--on-nan skip"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            {},
            "leave offload_param to nvme out",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            {},
            "leave offload_optimizer to nvme out",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            {},
            "leave zero_hpz_partition_size out",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            {},
            "leave zero_quantized_nontrainable_weights out",
        ),
        (STAGE_2, {"record_changes": True}, "--record-changes"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_so_is_refused(tmp_path, monkeypatch, config, given, says):
    monkeypatch.setenv("WORLD_SIZE", "1")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        check(RunSettings(model="x", output=Path("y"), task="cola", deepspeed=path, **given))


def test_it_wants_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "ds.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="torchrun"):
        check(RunSettings(model="x", output=Path("y"), task="cola", deepspeed=path))
    path.write_text("{")
    with pytest.raises(UserError, match="JSONDecodeError"):
        check(RunSettings(model="x", output=Path("y"), task="cola", deepspeed=path))
    with pytest.raises(UserError, match="FileNotFoundError"):
        check(RunSettings(model="x", output=Path("y"), task="cola", deepspeed=Path("none.json")))
