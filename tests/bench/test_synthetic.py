"""The paper's regression, at a size for tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rosa.bench import synthetic
from rosa.bench.grid.executors import EXECUTORS
from rosa.bench.report.pictures import of_comparison
from rosa.bench.report.results import read_comparison
from rosa.bench.setup.checking import check
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import runs
from rosa.bench.storage.record import read_record
from tests.helpers import Here, fails, run


@pytest.fixture
def few(monkeypatch) -> None:
    """128 examples: two steps an epoch."""
    monkeypatch.setattr(synthetic, "EXAMPLES", {"train": 128, "validation": 32, "test": 32})


def train(folder, model="linear", **values):
    given = RunSettings(model="", output=folder, **{"resample_every": "epoch", **values})
    settings = synthetic.settings_for(model, given)
    settings.output.parent.mkdir(exist_ok=True)
    record = synthetic.train(check(settings), "some", lambda share: None)
    assert record == read_record(settings.output)
    return record, runs.read_json(settings.output / runs.HISTORY)


def test_rosa_passes_what_lora_can_reach(tmp_path):
    """At a quarter of the true rank LoRA keeps most of the loss, ROSA hardly any of it."""
    found = {}
    for method, lr, options in (("lora", 0.01, {}), ("rosa", 0.1, {"directions": "svd"})):
        how = {"method": method, "rank": 6, "lr": lr, "epochs": 24, "record_changes": True}
        found[method] = train(tmp_path / method, **how, **options)
        record, history = found[method]
        assert [e["epoch"] for e in history["epochs"]] == list(range(1, 25))
        assert history["epochs"][-1]["eval_loss"] == record.validation
    losses = {method: record.scores["test_loss"] for method, (record, _) in found.items()}
    assert losses["lora"] > 0.3
    assert losses["rosa"] < losses["lora"] / 100
    ranks = {m: h["changes"]["epochs"][-1]["ranks"]["layers.0"] for m, (_, h) in found.items()}
    assert ranks["lora"] <= 6 < synthetic.TRUE_RANK <= ranks["rosa"]


def test_the_learning_rate_falls_to_zero(tmp_path, few, monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    record, _ = train(tmp_path, method="rosa", rank=2, lr=0.1, epochs=4)
    assert rates == pytest.approx([0.1 * left / 8 for left in range(8, 0, -1)])
    assert record.steps == len(rates)


@pytest.mark.parametrize(
    ("every", "directions", "drawn"),
    [
        ("epoch", "svd", [2, 4, 6]),
        ("3", "orthonormal", [3, 6]),
        ("never", "svd", []),
        ("epoch", "gradient", [1, 3, 5, 7]),  # the first draw comes early
    ],
)
def test_subspaces_are_drawn_as_a_run_draws_them(
    tmp_path, few, monkeypatch, every, directions, drawn
):
    import rosa

    seen = []
    resample = rosa.resample

    def watched(model, optimizer, *, batches, **options):
        batches = list(batches)
        seen.append(len(batches))
        return resample(model, optimizer, batches=batches, **options)

    monkeypatch.setattr(rosa, "resample", watched)
    how = {"resample_every": every, "directions": directions}
    record, history = train(tmp_path, "mlp", method="rosa", rank=2, lr=0.01, epochs=4, **how)
    assert history["drawn_at"] == drawn
    assert record.resamples == len(seen) == len(drawn)
    assert seen[:1] == [2][: len(drawn)]  # all 128 examples, in batches of 64
    assert not any(seen[1:])


def test_a_long_run_has_a_short_curve(tmp_path, few):
    _, history = train(tmp_path, method="full", lr=0.1, epochs=120)
    assert len(history["epochs"]) == synthetic.POINTS
    assert history["epochs"][-1]["epoch"] == 120


@pytest.mark.parametrize("model", synthetic.MODELS)
@pytest.mark.parametrize("method", synthetic.METHODS)
def test_every_method_learns(tmp_path, few, method, model):
    how = {} if method in ("full", "targets") else {"rank": 4, "resample_every": "never"}
    record, _ = train(tmp_path, model, method=method, lr=0.01, epochs=8, **how)
    assert record.train_loss < 1
    assert record.trainable_parameters > 0


def test_losses_are_over_those_before_training(tmp_path, few):
    record, _ = train(tmp_path, method="lora", rank=4, lr=1e-7, epochs=1)
    assert record.validation == pytest.approx(1, abs=1e-3)
    assert record.scores["test_loss"] == pytest.approx(1, abs=1e-3)


def test_a_training_that_diverges_is_an_error(tmp_path, few):
    with pytest.raises(ValueError, match="diverged at --lr 1e\\+20"):
        train(tmp_path, method="full", lr=1e20, epochs=8)


def test_the_same_cell_is_the_same_again(tmp_path, few):
    how = {"method": "rosa", "rank": 2, "lr": 0.1, "epochs": 2, "seed": 3}
    (one, _), (again, _) = (train(tmp_path / name, **how) for name in "ab")
    own = {"train_seconds": 0.0, "resample_seconds": 0.0, "peak_memory_mib": 0.0}
    assert replace(one, **own) == replace(again, **own)
    other, _ = train(tmp_path / "c", **{**how, "seed": 4})
    assert other.scores != one.scores


def test_the_command_searches_reports_and_goes_on(tmp_path, few, monkeypatch, capsys):
    monkeypatch.setitem(EXECUTORS, "processes", Here)
    command = ["synthetic", "--models", "linear", "--methods", "lora,full", "--ranks", "2,8"]
    command += ["--seeds", "0,1", "--epochs", 3, "--output", tmp_path]
    run(*command)
    printed = capsys.readouterr().out
    assert "before training: test loss 1.0000" in " ".join(printed.split())
    comparison = read_comparison(tmp_path / "linear")
    assert [(row.name, len(row.records)) for row in comparison.rows] == [
        ("full", 2),
        ("lora, r 2", 2),
        ("lora, r 8", 2),
    ]
    assert not any(row.at_edge for row in comparison.rows)  # no --lrs: they are searched
    assert "Validation loss at every rank: lora" in of_comparison(comparison)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("linear/*/metrics.json")}
    run(*command)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("linear/*/metrics.json")}


def test_the_command_in_processes_of_its_own(tmp_path):
    grid = ["--methods", "full", "--lrs", 0.01, "--seeds", 0, "--epochs", 1]
    run("synthetic", "--models", "linear", *grid, "--output", tmp_path)
    assert (tmp_path / "linear" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "cnn"], "unknown model 'cnn'; there are: linear, mlp"),
        (["--models", "linear,cnn"], "unknown model 'cnn'"),
        (["--models", ","], "no models"),
        (["--ranks", "33"], "ranks must be from 1 to 32"),
        (["--ranks", "0"], "ranks must be from 1 to 32"),
        (["--seeds", ""], "no seeds"),
        (["--lrs", "fast"], "are not numbers"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--methods", "adalora"], "trains no adalora"),
        (["--methods", "rosa+batch_size=8"], "not in batch_size"),
        (["--methods", "full+weight_decay=0.1"], "not in weight_decay"),
        (["--methods", "lora+directions=svd"], "directions is ROSA's"),
        (["--resample-every", "sometimes"], "resample_every must be"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(tmp_path, arguments, message, capsys):
    assert message in fails(capsys, "synthetic", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
