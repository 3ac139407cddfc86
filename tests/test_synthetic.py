"""The paper's regression, at a size for tests."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from rosa.bench import synthetic
from rosa.bench.synthetic import Run, best_lr, experiment, summary, train
from tests.helpers import fails, run


def test_rosa_passes_what_lora_can_reach():
    """At a quarter of the true rank LoRA keeps most of the loss, ROSA hardly any of it."""
    losses = {}
    for method, lr in (("lora", 0.01), ("rosa", 0.1)):
        result = train(Run("linear", method, 6, lr, 0, epochs=24, resample_every=1))
        losses[method] = result["test"] / result["before"]
        assert [epoch for epoch, _ in result["curve"]] == list(range(1, 25))
        assert result["curve"][-1][1] == result["validation"]
    assert losses["lora"] > 0.3
    assert losses["rosa"] < losses["lora"] / 100


def test_the_learning_rate_falls_to_zero(monkeypatch):
    monkeypatch.setattr(synthetic, "EXAMPLES", {"train": 128, "validation": 32, "test": 32})
    rates = []
    step = torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    train(Run("linear", "rosa", 2, 0.1, 0, epochs=4, resample_every=1))
    assert rates == pytest.approx([0.1 * left / 8 for left in range(8, 0, -1)])


def test_a_long_run_has_a_short_curve(monkeypatch):
    monkeypatch.setattr(synthetic, "EXAMPLES", {"train": 64, "validation": 32, "test": 32})
    curve = train(Run("linear", "full", None, 0.1, 0, epochs=120, resample_every=1))["curve"]
    assert len(curve) == synthetic.POINTS
    assert curve[-1][0] == 120


def test_an_experiment_goes_on_where_it_was_and_sums_up(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "EXAMPLES", {"train": 64, "validation": 32, "test": 32})
    options = {"models": ["linear"], "ranks": [4], "epochs": 2, "resample_every": 1, "jobs": 1}
    experiment(tmp_path, **options, lrs=[1e-3], seeds=[0])
    found = experiment(tmp_path, **options, lrs=[1e-3, 1e-2], seeds=[0, 1])
    assert json.loads((tmp_path / synthetic.RESULT).read_text()) == found
    assert len(found["runs"]) == 5 * 3  # two rates with one seed, the best with the other
    rows = list(summary(found))
    names = [row["method"] for row in rows]
    assert names == ["full", "lora", "rosa", "rosa-gradient", "rosa-orthonormal"]
    assert rows[0]["over_full"] == 1
    for row in rows:
        group = row["model"], row["method"], row["rank"]
        assert row["lr"] == best_lr(found, group, [1e-3, 1e-2], 0)
        chosen = [
            r
            for r in found["runs"].values()
            if (r["method"], r["lr"]) == (row["method"], row["lr"])
        ]
        assert row["loss"] == pytest.approx(sum(r["test"] / r["before"] for r in chosen) / 2)
        assert row["over_full"] == pytest.approx(row["loss"] / rows[0]["loss"])
    for name, row in list(found["runs"].items()):  # a method of an older file, which is no more
        if row["method"] == "rosa":
            found["runs"][f"older {name}"] = {**row, "method": "rosa-split-b"}
    assert "rosa-split-b" in [row[0] for row in synthetic.shown_rows(found, "linear")]
    (picture,) = synthetic.pictures(found, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="of other settings"):
        experiment(tmp_path, **{**options, "epochs": 3}, lrs=[1e-3], seeds=[0])


def test_runs_in_another_process_are_the_same(tmp_path):
    one = Run("linear", "rosa", 2, 0.1, 3, epochs=1, resample_every=1)
    found = {"settings": {}, "runs": {}}
    synthetic._train_all(tmp_path / "found.json", found, [one], 2, None)
    assert found["runs"] == {one.name: {**asdict(one), **train(one)}}


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2, 3e-2, 0.3, 3.0])
def test_a_search_goes_on_until_the_best_rate_has_neighbours(tmp_path, monkeypatch, best):
    def trained(path, found, todo, jobs, say):
        for one in todo:
            loss = abs(math.log(one.lr / best))
            row = {"validation": loss, "test": loss + 1, "before": 1.0, "curve": [[1, loss]]}
            found["runs"][one.name] = {**asdict(one), **row}

    monkeypatch.setattr(synthetic, "_train_all", trained)
    found = experiment(tmp_path, models=["linear"], ranks=[4], seeds=[0, 1])
    for row in summary(found):
        assert (row["lr"], row["seeds"]) == (best, 2)
        assert row["at_edge"] == (best in (min(synthetic.LRS), max(synthetic.LRS)))


def test_how_soon_is_an_epoch_of_the_mean_curve():
    losses = {0: [0.5, 0.012, 0.004], 1: [0.5, 0.016, 0.002]}
    row = {"model": "linear", "method": "full", "rank": None, "lr": 1e-2, "before": 2.0}
    runs = {
        f"s{seed}": {
            **row,
            "seed": seed,
            "curve": list(zip([2, 4, 6], values, strict=True)),
            "validation": values[-1],
            "test": values[-1],
        }
        for seed, values in losses.items()
    }
    (found,) = summary({"runs": runs})
    assert found["soon"] == 4  # (0.012 + 0.016) / 2 / 2.0
    runs["s1"]["curve"] = [(2, 0.5), (4, 0.5), (6, 0.5)]
    (found,) = summary({"runs": runs})
    assert found["soon"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "cnn"], "unknown model 'cnn'; there are: linear, mlp"),
        (["--ranks", "33"], "ranks must be from 1 to 32"),
        (["--seeds", ""], "no seeds"),
        (["--lrs", "fast"], "--lrs takes numbers"),
        (["--epochs", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(tmp_path, arguments, message, capsys):
    assert message in fails(capsys, "synthetic", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    run(
        *("synthetic", "--models", "linear", "--ranks", 8, "--lrs", 0.01, "--seeds", 0),
        *("--epochs", 1, "--jobs", 1, "--output", tmp_path),
    )
    assert "LoRA" in capsys.readouterr().out
    assert (tmp_path / "synthetic-linear.png").is_file()
