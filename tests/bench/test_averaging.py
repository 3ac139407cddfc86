"""A step's loss is the mean over its items: however it is split, the run is the same."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rosa.bench.setup.methods import METHODS
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import checkpoints
from rosa.bench.train import building, training
from rosa.errors import UserError
from tests.chats import chat_model, words, write_chats
from tests.models import needs_packages, save_with_tokenizer, tiny_bert, tiny_gpt2
from tests.processes import free_port

EFFECTIVE = 16
CHATS = ["chats"] if find_spec("trl") else []
PREFERENCES = ["preferences"] if CHATS else []
TASKS = ("classification", "regression", "text", "pairs", *CHATS, *PREFERENCES)


def write_rows(path: Path, task: str, count: int) -> Path:
    """Rows of very different lengths: a mean of batches' means is not the mean over all."""
    if task == "chats":
        return write_chats(path, count)
    if task == "classification":
        lines = ["text,label", *(f"{words(12)},{i % 3}" for i in range(count))]
    elif task == "text":
        lines = [words(20) for _ in range(count)]
    elif task == "preferences":
        ends = {"prompt": "is a", "chosen": "good film", "rejected": "poor book"}
        rows = [{name: f"{words(8)} {end}" for name, end in ends.items()} for _ in range(count)]
        lines = [json.dumps(row) for row in rows]
    else:
        rows = [{"prompt": words(8), "completion": words(8)} for _ in range(count)]
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_scores(path: Path, count: int) -> None:
    header = ["index", "genre", "filename", "sentence1", "sentence2", "score"]
    rows = [
        [str(i), "n", "f", words(6), words(6), f"{5 * random.random():.3f}"] for i in range(count)
    ]
    path.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n")


def settings_for(task: str, folder: Path) -> RunSettings:
    """A run of two epochs whose last step is a partial one, as is the last evaluation batch."""
    random.seed(torch.initial_seed())
    if task in ("text", "pairs", "chats", "preferences"):
        base = chat_model(folder / "base")
    else:
        base = save_with_tokenizer(tiny_bert(), folder / "base")
    sizes = random.randint(33, 47), random.randint(17, 31)
    files: dict[str, Any] = {}
    if task == "regression":
        for name, count in zip(("train", "dev"), sizes, strict=True):
            write_scores(folder / f"{name}.tsv", count)
        files = {"task": "stsb", "data": folder}
    else:
        ending = {"classification": "csv", "text": "txt"}.get(task, "jsonl")
        files["preference"] = task == "preferences"
        for name, count in zip(("train", "validation"), sizes, strict=True):
            files[name] = write_rows(folder / f"{name}.{ending}", task, count)
    return RunSettings(
        model=str(base), output=folder, **files, epochs=2, lr=0.01, batch_size=EFFECTIVE,
        eval_batch_size=8, warmup=0.0, directions="orthonormal", precision="fp32",
    )  # fmt: skip


class GradientNorms(TrainerCallback):
    """Keeps the norm of every step's gradient before it is clipped."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


def train(settings: RunSettings, **split: int) -> dict[str, Any]:
    """The run's numbers, and the weights that it ended with."""
    recorder, build = GradientNorms(), training.build_trainer

    def recording(*args: Any) -> Any:
        trainer, callback = build(*args)
        trainer.add_callback(recorder)
        trainer.args.adam_epsilon = 1e-4  # of a gradient of rounding alone, Adam makes whole steps
        return trainer, callback

    training.build_trainer = recording
    checkpoints.KEPT = 10  # all of them
    try:
        begun = (settings.output / "settings.json").exists()
        record = training.train(replace(settings, **split), resume=begun)
    finally:
        training.build_trainer = build
    weights = next(settings.output.glob("[am]*/*.safetensors"))
    names = ("train_loss", "eval_loss", "steps", record.metric, record.reported)
    return {
        "record": {name: record.to_json()[name] for name in names},
        "norms": recorder.norms,
        "weights": load_file(weights),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["record"] == pytest.approx(expected["record"], rel=1e-4, abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=2e-3, atol=2e-4, msg=name)


def assert_as_whole(runs: list[RunSettings], **whole: Any) -> None:
    """What two processes have trained is what one trains, which has other settings of these."""
    for settings in runs:
        one = replace(settings, output=settings.output.with_suffix(".whole"), **whole)
        expected = train(one)
        both = [torch.load(settings.output / f"found{rank}.pt") for rank in (0, 1)]
        assert both[0]["record"] == both[1]["record"], settings.output
        assert_same(both[0], expected)
        texts = [folder / "predictions.json" for folder in (settings.output, one.output)]
        if settings.task == "e2e":
            assert texts[0].read_text() == texts[1].read_text()


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_nothing(tmp_path, task):
    settings = settings_for(task, tmp_path)
    whole = train(replace(settings, output=tmp_path / "1"))
    for parts in (2, 4):
        found = train(
            replace(settings, output=tmp_path / str(parts)),
            batch_size=EFFECTIVE // parts,
            gradient_accumulation=parts,
            eval_batch_size=8 // parts,
        )
        assert_same(found, whole)


SENSITIVE = {
    "adalora": "its ranks move by a hair's breadth",
    "lora_ga": "its start depends on the signs of a random SVD; see the next test",
    "olora": "PEFT's does not fit a Conv1D",
}
EXACT = [name for name in METHODS if name not in SENSITIVE]
NOT_OF_DECODERS = ("head", "miss", "oft", "lokr", "shira", "galore", "apollo")
"""No head of a task, or not for the Conv1D of GPT-2's kind."""


@pytest.mark.parametrize(
    ("task", "method"),
    [("classification", name) for name in EXACT]
    + [("pairs", name) for name in EXACT if name not in NOT_OF_DECODERS]
    + [(task, name) for task in CHATS for name in ("full", "prompt", "prefix")],
)
def test_accumulation_changes_no_method(tmp_path, method, task):
    needs_packages(method)
    settings = replace(settings_for(task, tmp_path), method=method, epochs=1)
    if METHODS[method].has_rank:
        settings = replace(settings, rank=2)
    whole = train(replace(settings, output=tmp_path / "whole"))
    parts = train(
        replace(settings, output=tmp_path / "parts"), batch_size=4, gradient_accumulation=4
    )
    assert_same(parts, whole)


@pytest.mark.parametrize("task", ["classification", "pairs", *CHATS])
def test_lora_ga_begins_with_the_same_gradient(tmp_path, monkeypatch, task):
    settings = replace(settings_for(task, tmp_path), method="lora_ga", epochs=1, rank=2)
    find, seen = building._find_gradients, []

    def record(model: Any, *args: Any) -> None:
        find(model, *args)
        seen.append({n: m._peft_loraga_grad.clone() for n, m in model.named_modules()
                     if hasattr(m, "_peft_loraga_grad")})  # fmt: skip

    monkeypatch.setattr(building, "_find_gradients", record)
    train(replace(settings, output=tmp_path / "whole"))
    train(replace(settings, output=tmp_path / "parts"), batch_size=4, gradient_accumulation=4)
    whole, parts = seen
    assert whole
    for name, gradient in whole.items():  # LoRA-GA takes its directions alone
        torch.testing.assert_close(
            parts[name] / parts[name].norm(), gradient / gradient.norm(), msg=name
        )


def train_in_two(rank: int, port: int, runs: list[tuple[RunSettings, dict[str, int]]]) -> None:
    """One of two processes as torchrun starts them; each run's numbers go beside its files."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for settings, split in runs:
        torch.save(train(settings, **split), settings.output / f"found{rank}.pt")
        unset_hf_deepspeed_config()  # or the next model is loaded in parts
    gc.collect()  # no model must be the last to hold the group
    torch.distributed.destroy_process_group()


def writing_settings(folder: Path) -> RunSettings:
    folder.mkdir()
    base = save_with_tokenizer(tiny_gpt2(), folder / "base")
    rows = [f'"name[P{i}], food[soup]","P{i} has {words(2)}."' for i in range(20)]
    for name in ("devset.csv", "testset_w_refs.csv"):
        (folder / name).write_text("\n".join(["mr,ref", *rows]) + "\n")
    return RunSettings(
        model=str(base), output=folder, task="e2e", data=folder, limit_train=13, limit_test=2,
        epochs=1, lr=0.01, batch_size=EFFECTIVE, directions="orthonormal", precision="fp32",
    )  # fmt: skip


def test_two_processes_change_nothing(tmp_path):
    quarters = {"batch_size": EFFECTIVE // 4, "gradient_accumulation": 2}
    cases = {}
    for task in TASKS:
        (tmp_path / task).mkdir()
        settings = settings_for(task, tmp_path / task)
        cases[task, "rosa"] = settings, quarters
    whole_batches = {"batch_size": EFFECTIVE // 2}
    for task, method in (("classification", "full"), ("pairs", "prompt")):
        settings = replace(cases[task, "rosa"][0], method=method)
        cases[task, method] = settings, whole_batches
    cases["e2e", "rosa"] = writing_settings(tmp_path / "e2e"), quarters  # one writes its texts
    runs = [
        (replace(settings, output=tmp_path / f"{task}-{name}"), split)
        for (task, name), (settings, split) in cases.items()
    ]
    multiprocessing.spawn(train_in_two, (free_port(), runs), nprocs=2, daemon=True)
    assert_as_whole([settings for settings, _ in runs])


def test_two_processes_go_on_in_the_middle_of_an_epoch(tmp_path):
    """Its last step is a partial one, which Accelerate does not say of such an epoch."""
    settings = settings_for("pairs", tmp_path)
    rows = len(settings.train.read_text().splitlines())
    split = {"batch_size": EFFECTIVE // 4, "steps": 2 * -(-rows // (EFFECTIVE // 2))}
    settings = replace(settings, output=tmp_path / "run")
    multiprocessing.spawn(train_in_two, (free_port(), [(settings, split)]), nprocs=2, daemon=True)
    whole = torch.load(settings.output / "found0.pt")
    (settings.output / "metrics.json").unlink()
    last = max((settings.output / "checkpoints").iterdir(), key=lambda p: int(p.name[11:]))
    shutil.rmtree(last)
    multiprocessing.spawn(train_in_two, (free_port(), [(settings, split)]), nprocs=2, daemon=True)
    resumed = torch.load(settings.output / "found0.pt")
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    assert resumed["record"] == whole["record"]

    (settings.output / "metrics.json").unlink()
    other = (
        rf"processes \(2 there, 1 here\)\. A step has {EFFECTIVE // 2} rows there and 4 here: --"
    )
    with pytest.raises(UserError, match=other):
        train(settings, **split)


def stopped(settings: RunSettings, name: str) -> RunSettings:
    """A copy of a finished run, as if it had been stopped after its last checkpoint but one."""
    shutil.copytree(settings.output, output := settings.output.with_name(name))
    (output / "metrics.json").unlink()
    last = max((output / "checkpoints").iterdir(), key=lambda p: int(p.name[11:]))
    shutil.rmtree(last)
    return replace(settings, output=output)


def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    """From the middle of an epoch, and of the steps that are watched before a draw."""
    halves = {"batch_size": EFFECTIVE // 4, "gradient_accumulation": 2}
    more = {"steps": 10, "first_draw": 9, "directions": "gradient"}
    wholes, runs = [], []
    for task in TASKS:
        (tmp_path / task).mkdir()
        settings = replace(settings_for(task, tmp_path / task), **more)
        by_length = task != "preferences"
        settings = replace(settings, output=tmp_path / f"{task}-one", group_by_length=by_length)
        wholes.append(train(settings))
        runs.append((replace(settings, output=tmp_path / f"{task}-two"), halves))
        runs.append((stopped(settings, f"{task}-one-then-two"), halves))
    multiprocessing.spawn(train_in_two, (free_port(), runs), nprocs=2, daemon=True)
    for whole, (two, _), (then_two, _) in zip(wholes, runs[::2], runs[1::2], strict=True):
        assert_same(torch.load(two.output / "found0.pt"), whole)
        then_one = train(stopped(two, f"{two.output.name}-then-one"))
        for found in (torch.load(then_two.output / "found0.pt"), then_one):
            assert len(found["norms"]) == 2, two.output  # steps 9 and 10
            assert_same(found, {**whole, "norms": whole["norms"][-2:]})


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "rosa", *map(str, arguments)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=threads)


def test_the_command_in_two_processes(tmp_path):
    settings, out = settings_for("classification", tmp_path), tmp_path / "run"
    files = ["--train", settings.train, "--validation", settings.validation]
    command = ["train", "--model", settings.model, *files, "--batch-size", 8, "--output", out]
    command += ["--epochs", 2, "--lr", 0.01, "--directions", "orthonormal", "--rank", 2]
    found = torchrun(*command)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("train_loss") == 1  # one table
    record = json.loads((out / "metrics.json").read_text())
    assert record["steps"] == 2 * -(-record["train_examples"] // 16)
    assert len(json.loads((out / "history.json").read_text())["epochs"]) == 2
    assert not list(out.glob("**/*.partial"))

    refused = torchrun(*command)  # the folder is in use: said once
    assert refused.returncode != 0
    assert " ".join(refused.stderr.split()).count("already holds a run") == 1

    (out / "metrics.json").unlink()  # stopped before its last word
    shutil.rmtree(max((out / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1])))
    again = torchrun(*command, "--resume")
    assert again.returncode == 0, again.stderr
    resumed = json.loads((out / "metrics.json").read_text())
    for name in ("steps", "epochs", "train_loss", "eval_loss", "accuracy"):
        assert resumed[name] == pytest.approx(record[name], rel=1e-3), name
