"""The paper's regression, at a size for tests."""

from __future__ import annotations

import pytest

from rosa import synthetic
from rosa.synthetic import Run, best_lr, experiment, summary, train
from tests.test_cli import fails, run


def test_rosa_passes_what_lora_can_reach():
    """At a quarter of the true rank LoRA keeps most of the loss, ROSA does not."""
    losses = {}
    for method in ("lora", "rosa"):
        result = train(Run("linear", method, 6, 0.01, 0, epochs=24, resample_every=4))
        losses[method] = result["test"] / result["before"]
        assert len(result["validation"]) == 24
    assert losses["lora"] > 0.3
    assert losses["rosa"] < losses["lora"] / 3


def test_an_experiment_goes_on_where_it_was_and_sums_up(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "EXAMPLES", {"train": 64, "validation": 32, "test": 32})
    options = {"models": ["linear"], "ranks": [4], "epochs": 2, "resample_every": 1, "jobs": 1}
    experiment(tmp_path, **options, lrs=[1e-3], seeds=[0])
    found = experiment(tmp_path, **options, lrs=[1e-3, 1e-2], seeds=[0, 1])
    assert len(found["runs"]) == 5 * 3  # two rates with one seed, the best with the other
    rows = list(summary(found))
    names = [row["method"] for row in rows]
    assert names == ["full", "lora", "rosa", "rosa-gradient", "rosa-orthonormal"]
    assert rows[0]["over_full"] == 1
    for row in rows:
        group = row["model"], row["method"], row["rank"]
        assert row["lr"] == best_lr(found, group, [1e-3, 1e-2], 0)
        tests = [
            r["test"] / r["before"]
            for r in found["runs"].values()
            if (r["method"], r["lr"]) == (row["method"], row["lr"])
        ]
        assert row["loss"] == pytest.approx(sum(tests) / 2)
    (picture,) = synthetic.pictures(found, tmp_path)
    assert "<svg" in picture.read_text()
    with pytest.raises(ValueError, match="of other settings"):
        experiment(tmp_path, **{**options, "epochs": 3}, lrs=[1e-3], seeds=[0])


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
    assert (tmp_path / "synthetic-linear.svg").is_file()
