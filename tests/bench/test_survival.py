"""A run that is killed, stopped, or out of disk, and gone on with, is the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.chats import chat_model, write_chats
from tests.helpers import fails, write_csv
from tests.helpers import run as run_here
from tests.processes import free_port, without_gloo

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it has no such signals")
if sys.platform != "win32":
    from tests import crash
    from tests.crash import AFTER, BEFORE, KILLED, PLACES, TERMINATED, Sabotage


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, its data, and the uninterrupted run of it: `whole`."""
    folder = tmp_path_factory.mktemp("survival")
    crash.prepare(folder)
    assert crash.run(crash.command(folder, folder / "whole")) == 0
    history = json.loads((folder / "whole" / "history.json").read_text())
    assert len(history["drawn_at"]) >= 3
    return folder


def told(run: Path) -> dict[str, Any]:
    """What a run's folder tells of it, but for how long it took."""
    history = json.loads((run / "history.json").read_text())
    for row in history["epochs"]:
        del row["eval_runtime"]
    return history


def test_the_run_is_the_same_each_time(folder, tmp_path):
    assert crash.run(crash.command(folder, tmp_path / "run")) == 0
    assert not crash.differences(tmp_path / "run", folder / "whole")


@pytest.mark.parametrize("when", [BEFORE, AFTER])
@pytest.mark.parametrize(("place", "call"), PLACES)
def test_killed_anywhere_it_goes_on_as_if_it_had_not_been(folder, tmp_path, place, call, when):
    out = tmp_path / "run"
    sabotage = Sabotage(place, call, when)
    assert crash.run(crash.command(folder, out), sabotage) == KILLED
    assert crash.run(crash.command(folder, out, "--resume")) == 0
    assert not crash.differences(out, folder / "whole")
    assert told(out) == told(folder / "whole")


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_the_step_and_says_how_to_go_on(folder, tmp_path, asked):
    out = tmp_path / "run"
    steps = sorted(random.sample(range(1, 30), 3))
    for before, step in zip([0, *steps], steps, strict=False):
        place = "rosa.bench.train.surviving.SurvivingTrainer.training_step"
        sabotage = Sabotage(place, step - before, random.choice([BEFORE, AFTER]), asked)
        resume = ["--resume"] if before else []
        log = tmp_path / f"log-{step}"
        how = crash.command(folder, out, *resume)
        assert crash.run(how, sabotage, log=log) == 128 + asked, steps
        message = log.read_text()
        assert f"stopped after step {step}, which is saved" in message
        assert "--resume" in message
        assert "Traceback" not in message
    assert crash.run(crash.command(folder, out, "--resume")) == 0
    assert not crash.differences(out, folder / "whole"), steps


def test_batches_of_like_length_are_the_same_when_resumed_within_an_epoch(folder, tmp_path):
    more = ["--group-by-length"]
    assert crash.run(crash.command(folder, tmp_path / "whole", *more)) == 0
    sabotage = Sabotage(PLACES[0][0], 22, BEFORE, signal.SIGTERM)
    assert crash.run(crash.command(folder, tmp_path / "run", *more), sabotage) == TERMINATED
    assert crash.run(crash.command(folder, tmp_path / "run", *more, "--resume")) == 0
    assert not crash.differences(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_stopped_at_an_epochs_end_it_has_evaluated_it(folder, tmp_path, lr):
    def command(name: str, *more: str) -> list[Any]:
        files = ["--model", folder / "base", "--train", folder / "reviews.csv"]
        how = ["--epochs", 2.5, "--batch-size", 24, "--lr", lr, "--rank", 2]
        return ["train", *files, *how, "--output", tmp_path / name, *more]

    assert crash.run(command("whole")) == 0
    epochs = told(tmp_path / "whole")["epochs"]
    assert len(epochs) == 3
    for row in epochs:
        out = f"stopped-{row['step']}"
        sabotage = Sabotage(PLACES[0][0], row["step"], BEFORE, signal.SIGTERM)
        assert crash.run(command(out), sabotage) == TERMINATED
        assert crash.run(command(out, "--resume")) == 0
        assert told(tmp_path / out) == told(tmp_path / "whole")
        assert not crash.differences(tmp_path / out, tmp_path / "whole")


@pytest.mark.parametrize("more", [[], ["--packing"]])
def test_runs_of_chats_survive_too(tmp_path, more):
    pytest.importorskip("trl")
    chat_model(tmp_path / "base")
    write_chats(tmp_path / "reviews.csv", 60).rename(tmp_path / "chats.jsonl")

    def command(out: Path, *how: str) -> list[Any]:
        data = {tmp_path / "reviews.csv": tmp_path / "chats.jsonl"}
        return [data.get(a, a) for a in crash.command(tmp_path, out, "--max-length", 24, *how)]

    whole, out = tmp_path / "whole", tmp_path / "run"
    assert crash.run(command(whole, *more)) == 0
    for call in (9, 11):  # before the first checkpoint and after it
        sabotage = Sabotage(PLACES[0][0], call, AFTER)
        resume = ["--resume"] if out.exists() else []
        assert crash.run(command(out, *more, *resume), sabotage) == KILLED
    assert crash.run(command(out, *more, "--resume")) == 0
    assert not crash.differences(out, whole)
    assert told(out) == told(whole)


@pytest.mark.parametrize(
    ("method", "rank", "lr", "kept"),
    [("full", None, 1e-3, "model/model"), ("lora", 2, 1e-2, "adapter/adapter_model")],
)
def test_runs_of_other_methods_survive_too(folder, tmp_path, method, rank, lr, kept):
    how = ["--method", method, "--lr", lr]
    whole, out = (
        crash.command(folder, tmp_path / name, *how, rank=rank) for name in ("whole", "run")
    )
    assert crash.run(whole) == 0
    assert crash.run(out, Sabotage(PLACES[0][0], 17, AFTER)) == KILLED
    assert crash.run([*out, "--resume"]) == 0
    one, two = (tmp_path / n / f"{kept}.safetensors" for n in ("whole", "run"))
    assert one.read_bytes() == two.read_bytes()


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(folder, tmp_path):
    out = tmp_path / "run"
    sabotage = Sabotage(PLACES[0][0], 14, BEFORE, signal.SIGTERM)
    assert crash.run(crash.command(folder, out), sabotage) == TERMINATED
    log = tmp_path / "log"
    assert crash.run(crash.command(folder, out, "--resume"), largest=20_000, log=log) == 2
    message = " ".join(log.read_text().split())
    assert "the disk is full" in message
    assert "--resume" in message
    assert "Traceback" not in message
    assert (out / "checkpoints" / "checkpoint-14" / "whole.json").is_file()
    assert not list(out.glob("checkpoints/*/begun"))
    assert crash.run(crash.command(folder, out, "--resume")) == 0
    assert not crash.differences(out, folder / "whole")


def test_a_damaged_checkpoint_is_passed_over(folder, tmp_path):
    out = tmp_path / "run"
    sabotage = Sabotage(PLACES[0][0], 14, BEFORE, signal.SIGTERM)
    assert crash.run(crash.command(folder, out), sabotage) == TERMINATED
    damaged = out / "checkpoints" / "checkpoint-14" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    log = tmp_path / "log"
    assert crash.run(crash.command(folder, out, "--resume"), log=log) == 0
    assert "checkpoint-14 is damaged (optimizer.pt)" in " ".join(log.read_text().split())
    assert not crash.differences(out, folder / "whole")


def test_a_run_replaced_by_another_that_is_killed_can_be_replaced_again(folder, tmp_path):
    out = tmp_path / "run"
    assert crash.run(crash.command(folder, out)) == 0
    again = crash.command(folder, out, "--seed", 1, "--overwrite")
    assert crash.run(again, Sabotage("shutil.rmtree", 1)) == KILLED
    assert not (out / "metrics.json").exists()  # no finished run
    assert crash.run(crash.command(folder, out, "--overwrite")) == 0
    assert not crash.differences(out, folder / "whole")


@without_gloo
def test_where_one_of_two_processes_is_killed_the_other_says_so_and_one_goes_on(folder, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    halves = crash.command(folder, out, "--batch-size", 4)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    ranks = [{**shared, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2)]
    killed = crash.start(halves, Sabotage(PLACES[0][0], 11), None, None, ranks[1])
    left = crash.start(halves, None, None, log, ranks[0])
    killed.join()
    assert killed.exitcode == KILLED
    left.join(60)
    assert left.exitcode == 2
    told = log.read_text()
    assert "another process of this training has ended" in told
    assert "Traceback" not in told
    assert crash.run(crash.command(folder, out, "--resume")) == 0
    history = json.loads((out / "history.json").read_text())
    assert history["steps"][-1]["step"] == 30


def test_two_processes_do_not_train_in_one_folder(folder, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"):
        message = fails(capsys, *crash.command(folder, out))
    assert "another process is training" in message


def test_a_run_goes_on_with_the_data_it_was_begun_on(folder, tmp_path, capsys):
    data = write_csv(tmp_path / "data.csv")
    how = [
        data if a == folder / "reviews.csv" else a for a in crash.command(folder, tmp_path / "r")
    ]
    sabotage = Sabotage(PLACES[0][0], 3)
    assert crash.run(how, sabotage) == KILLED
    write_csv(data, rows=80)
    assert "training data is not what" in fails(capsys, *how, "--resume")
    run_here(*how, "--overwrite")


def test_a_comparison_that_is_stopped_stops_its_cells_and_goes_on(folder, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    files = ["--model", folder / "base", "--train", folder / "reviews.csv", "--output", out]
    how = ["compare", *files, "--methods", "rosa,lora", "--lrs", "1e-2", "--jobs", 2]
    how += ["--steps", 300, "--batch-size", 8, "--seeds", 0]
    process = crash.start(how, None, None, log)
    deadline = time.monotonic() + 300
    while not list(out.glob("*/checkpoints/*/whole.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == TERMINATED, log.read_text()
    for place in out.glob("*/.lock"):
        with FileLock(place).acquire(timeout=5):  # nobody trains there any more
            pass
    assert list(out.glob("*/checkpoints/*/whole.json"))
    assert crash.run(how, log=log) == 0, log.read_text()
    assert len(list(out.glob("*/metrics.json"))) == 2
