"""Cells as tasks of Ray: the same runs as in processes of this machine, and what goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rosa.bench.grid.cell import ERROR, Job
from rosa.bench.grid.cells import run_all
from rosa.bench.grid.executors import EXECUTORS, Processes, _make_there
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import runs
from rosa.errors import UserError
from tests.helpers import fails, write_csv
from tests.models import save_with_tokenizer, tiny_bert

ROOT = Path(__file__).parents[2]
pytest.importorskip("ray")


@pytest.fixture(autouse=True)
def _as_fast_as_others(monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whatever cluster is begun here
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    base = save_with_tokenizer(tiny_bert(), folder / "base")
    train, validation = write_csv(folder / "t.csv", 120), write_csv(folder / "v.csv", 40)
    data = ["--train", str(train), "--validation", str(validation), "--batch-size", "8"]
    return ["--model", str(base), *data, "--ranks", "2"]


def started(folder: Path, *words: object) -> subprocess.Popen[str]:
    """`rosa compare` in a process of its own, in a folder."""
    command = [sys.executable, "-m", "rosa", "compare", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in the background, an interrupt would be ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=folder, preexec_fn=heard, **pipes)


def of_training(cell: Path) -> dict[str, object]:
    """A finished cell's record, without what depends on the time and the process."""
    found = runs.read_json(cell / "metrics.json")
    return {n: v for n, v in found.items() if "seconds" not in n and "memory" not in n}


@pytest.mark.timeout(400)
def test_cells_are_the_same_as_in_processes_of_this_machine(files, tmp_path):
    grid = ["--methods", "rosa+resample_every=3,rosa+target_modules=nope", "--lrs", "1e-2"]
    grid += ["--seeds", "0", "--jobs", 2, "--epochs", 2]
    for executor in EXECUTORS:
        # The output is named from where the command is given.
        words = [*files, *grid, "--executor", executor, "--output", executor]
        process = started(tmp_path, *words)
        out, err = process.communicate()
        assert process.returncode == 2, err
        assert "--target-modules nope: No modules were targeted" in " ".join(out.split())
        assert "UserError" in next((tmp_path / executor).glob("*nope*")).joinpath(ERROR).read_text()
        assert (tmp_path / executor / "report.md").is_file()
    name = "rosa+resample_every=3-r2-lr0.01-s0"
    here, there = (of_training(tmp_path / each / name) for each in EXECUTORS)
    assert here == there
    assert here["resamples"] > 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_comparison_goes_on_from_the_step_that_it_was_in(files, tmp_path, how):
    grid = ["--methods", "rosa", "--lrs", "1e-2", "--seeds", 0, "--executor", "ray"]
    words = [*files, *grid, "--epochs", 100, "--output", "out"]
    process = started(tmp_path, *words)
    cell = tmp_path / "out" / "rosa-r2-lr0.01-s0"
    while process.poll() is None and not list(cell.glob("checkpoints/checkpoint-*")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == 128 + how, err
    steps = [int(path.name.rpartition("-")[2]) for path in cell.glob("checkpoints/checkpoint-*")]
    assert steps
    assert not runs.is_done(cell)
    if how == signal.SIGTERM:
        return
    assert "a comparison by the same command" in " ".join(err.split())
    process = started(tmp_path, *words)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert runs.is_done(cell)


@dataclass(frozen=True)
class Fatal(Job):
    """A run whose process is killed."""

    @property
    def name(self) -> str:
        return "fatal"

    def __getattribute__(self, name: str):
        if name == "settings":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_killed_cell_takes_no_other_with_it(executor):
    made = EXECUTORS[executor](1)
    job = Fatal(RunSettings(model="m", output=Path("o")), "v")
    console = Console(quiet=True)
    try:
        for _ in range(2):
            assert run_all([job], made, "x", console) == {
                "fatal": "its process was killed (out of memory?)"
            }
    finally:
        made.close()


def test_what_the_caller_has_begun_besides_is_left_alone():
    other = get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    made = Processes(1)
    made.begin(Job(RunSettings(model="m", output=Path("o")), "v"))
    made.stop()
    try:
        assert other.is_alive()
    finally:
        other.terminate()
        other.join()


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(RunSettings(model="m", output=Path("cmp/cell")), "v")
    with pytest.raises(UserError, match=r"does not see .*cmp: run from a folder that all of Ray's"):
        _make_there(job, 1, str(tmp_path))


def test_an_executor_that_is_none_or_not_installed_is_refused_first(
    files, tmp_path, capsys, monkeypatch
):
    words = ["compare", *files, "--output", tmp_path / "out", "--executor"]
    assert "must be one of processes, ray, got 'cloud'" in fails(capsys, *words, "cloud")
    monkeypatch.setattr("rosa.bench.grid.executors.find_spec", lambda name: None)
    assert "run pip install 'rosa-finetune[ray]'" in fails(capsys, *words, "ray")
    assert "run pip install 'rosa-finetune[ray]'" in fails(capsys, "shift", "--executor", "ray")
    monkeypatch.undo()
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:1:2")
    assert "--executor ray: no cluster can be reached" in fails(capsys, *words, "ray")


def test_the_files_for_clusters_are_what_their_tools_read():
    sweep = ROOT / "examples" / "sweep"
    script = sweep / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    found = yaml.safe_load((sweep / "skypilot.yaml").read_text("utf-8"))
    known = {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run"}
    assert set(found) == known
    assert subprocess.run(["bash", "-n", "-c", found["run"]], check=False).returncode == 0
    for text in (script.read_text("utf-8"), found["run"]):
        assert "rosa compare --executor ray" in text
