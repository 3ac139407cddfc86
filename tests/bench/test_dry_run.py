"""`rosa train --dry-run` tells what the run then does, and writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rosa.bench.rehearsal import rehearse
from rosa.bench.setup.settings import RunSettings
from tests.helpers import fails, run, write_csv
from tests.models import save_with_tokenizer, tiny_bert


@pytest.fixture
def given(tmp_path) -> dict[str, Any]:
    base = save_with_tokenizer(tiny_bert(), tmp_path / "base")
    train = write_csv(tmp_path / "t.csv", rows=90)
    return {"model": str(base), "output": tmp_path / "run", "train": train, "batch_size": 4}


@pytest.mark.parametrize("every", ["auto", "epoch", "7", "0.5epochs", "never"])
@pytest.mark.parametrize("directions", ["gradient", "orthonormal"])
def test_draws_come_when_they_were_said_to(given, every, directions):
    how = {"resample_every": every, "directions": directions, "rank": 1, "epochs": 8.0}
    _, about = rehearse(RunSettings(**given, **how), False, False)
    assert not given["output"].exists()
    options = [x for name, value in {**given, **how}.items()
               for x in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    run("train", *options)
    drawn = json.loads((given["output"] / "history.json").read_text())["drawn_at"]
    metrics = json.loads((given["output"] / "metrics.json").read_text())
    shown = str(about["draws at step"])
    if "in all" in shown:
        assert f"({len(drawn)} in all)" in shown
        drawn = drawn[:8]
    assert [int(n) for n in re.findall(r"\d+", shown.partition(", ...")[0])] == drawn
    assert str(about["steps"]).startswith(f"{metrics['steps']} (")
    assert f"{metrics['trainable_parameters']:,} of" in str(about["trained numbers"])


@pytest.mark.parametrize("method", ["rosa", "lora", "full", "head"])
def test_all_that_is_trained_is_in_the_table(given, method):
    rank = {"rank": 2} if method in ("rosa", "lora") else {}
    rows, about = rehearse(RunSettings(**given, method=method, **rank), False, False)
    total = sum(int(row[-1].replace(",", "")) for row in rows)
    assert str(about["trained numbers"]).startswith(f"{total:,} of")
    if rank:
        (query,) = (row for row in rows if row[0].endswith("query"))
        assert query[:3] == ["bert.encoder.layer.*.attention.self.query", "2", "16 x 16"]
        assert query[3].count("2 x 16") == query[3].count("16 x 2") == 1
        assert query[4] == "128"


def test_the_command_prints_and_leaves_the_folder_alone(given, capsys):
    files = ["--model", given["model"], "--train", given["train"], "--output", given["output"]]
    run("train", *files, "--dry-run")
    printed = capsys.readouterr().out
    for word in (
        "query",
        "AdamW's moments, MiB",
        "draws at step",
        "nothing was trained or written",
    ):
        assert word in printed
    assert not Path(given["output"]).exists()
    assert "lr must be positive" in fails(capsys, "train", *files, "--dry-run", "--lr", 0)
