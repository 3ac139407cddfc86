"""A folder that is exported into: whole or as it was, whatever stops the export."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from peft import get_peft_model

from rosa import RosaConfig, export_merged
from rosa.bench import exporting
from rosa.bench.processes import cleaning_up
from rosa.errors import UserError
from rosa.export.staging import contents, staged
from tests.helpers import fails, run, trained_run, write_csv
from tests.models import Mlp, save_with_tokenizer, tiny_bert


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


STOPS = [KeyboardInterrupt, SystemExit, MemoryError, UserError]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("there", [(), ("notes.txt", "sub/more.txt")])
@pytest.mark.parametrize("when", ["writing", "moving"])
def test_an_exception_leaves_the_folder_as_it_was(tmp_path, monkeypatch, stop, there, when):
    folder = tmp_path / "new" / "out"
    for name in there:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before, rename = files(tmp_path), Path.rename

    def moved(path: Path, target: Path) -> Path:
        if path.name == "two.bin":
            raise stop("moving")
        return rename(path, target)

    def export() -> None:
        with staged(folder) as place:
            (place / "one").mkdir()
            (place / "one" / "part").write_text("x")
            (place / "two.bin").write_text("x")
            if when == "writing":
                raise stop("writing")

    monkeypatch.setattr(Path, "rename", moved)
    with pytest.raises(stop):
        export()
    assert files(tmp_path) == before


_KILLED = """
import os, signal, sys
from rosa.bench.processes import cleaning_up
from rosa.export.staging import staged
with cleaning_up(), staged(sys.argv[1]) as place:
    (place / "part").write_text("x")
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_what_a_killed_export_leaves_is_no_ones_and_is_deleted(tmp_path, how):
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "out"), how]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    status = subprocess.run(command, env=environment, check=False).returncode
    if how == "SIGTERM":
        assert status == 128 + signal.SIGTERM
        assert not (tmp_path / "out").exists()
        return
    assert any(path.name.startswith(".export-") for path in (tmp_path / "out").iterdir())
    export_merged(get_peft_model(Mlp(), RosaConfig(target_modules=["first"])), tmp_path / "out")
    assert files(tmp_path / "out") == {"pytorch_model.bin"}


def test_only_what_is_known_to_be_left_over_is_deleted(tmp_path):
    host, mine = socket.gethostname(), os.getpid()
    kept = [f".export-{host}-{mine}-a", f".export-elsewhere-{2**22 + 1}-b", ".export-abc"]
    for name in (*kept, f".export-{host}-{2**22 + 1}-c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    (tmp_path / "notes").write_text("mine")
    assert contents(tmp_path) == ["notes"]
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "notes"}
    assert contents(tmp_path / "nothing") == []


def test_the_command_exports_into_a_folder_that_a_killed_one_left(tmp_path, monkeypatch, capsys):
    trained_run(tmp_path, steps=2)
    (tmp_path / "out" / ".export-abc").mkdir(parents=True)
    run("export", tmp_path / "run", "--to", "rosa", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert "not empty" in fails(
        capsys, "export", tmp_path / "run", "--to", "rosa", "--output", tmp_path / "out"
    )
    handler = signal.getsignal(signal.SIGTERM)

    def terminated(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(exporting, "write_rosa", terminated)
    with pytest.raises(SystemExit) as stop:
        run("export", tmp_path / "run", "--to", "rosa", "--output", tmp_path / "other")
    assert stop.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "other").exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    with cleaning_up():
        assert signal.getsignal(signal.SIGTERM) is not handler


@pytest.mark.parametrize(
    ("kind", "task"), [("TokenClassification", "TOKEN_CLS"), ("QuestionAnswering", "QUESTION_ANS")]
)
def test_models_of_other_tasks_are_not_exported_without_their_heads(tmp_path, capsys, kind, task):
    base = getattr(transformers, f"BertFor{kind}")(tiny_bert().config)
    save_with_tokenizer(base, tmp_path / "base")
    model = get_peft_model(base, RosaConfig(r=2, target_modules=["query"], task_type=task))
    model.base_model.model.name_or_path = str(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    for more in (["--to", "merged"], ["--to", "lora"], ["--to", "merged", "--low-memory"]):
        how = ["export", tmp_path / "adapter", *more, "--output", tmp_path / "out"]
        assert f"{task}) than the command knows" in (told := fails(capsys, *how))
        assert "rosa.export_merged" in told
        assert not (tmp_path / "out").exists()
    export_merged(model, tmp_path / "plain")
    data = write_csv(tmp_path / "v.csv")
    assert kind in fails(capsys, "evaluate", tmp_path / "plain", "--validation", data)
