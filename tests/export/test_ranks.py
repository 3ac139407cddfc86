"""Exports to LoRA within a budget: the best approximation, and its error is told."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from rosa import RosaConfig, export_lora, resample
from rosa.algebra.lowrank import LowRank
from rosa.export.ranks import Budget, relative_error, within
from rosa.layers.in_model import rosa_layers
from tests.helpers import fails, moved, run, trained_run

SHAPES = {"a": (12, 8), "b": (6, 10), "c": (3, 7, 5)}


def changes() -> dict[str, LowRank]:
    found = {}
    for scale, (name, shape) in enumerate(SHAPES.items(), 1):
        *stack, out_features, in_features = shape
        b = torch.randn(*stack, out_features, 5, dtype=torch.float64)
        a = torch.randn(*stack, 5, in_features, dtype=torch.float64)
        found[name] = LowRank(b * scale, a).compressed()
    return found


def cost(change: LowRank) -> int:
    return sum(part.numel() for part in (change.A, change.B))


def lost(whole: dict[str, LowRank], kept: dict[str, LowRank]) -> float:
    return sum(float((whole[n].dense() - kept[n].dense()).square().sum()) for n in whole)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_those_of_a_rank_are_the_best_of_each(rank):
    whole = changes()
    kept = within(Budget(rank), whole)
    for name, change in kept.items():
        assert change.rank == rank
        u, s, vh = torch.linalg.svd(whole[name].dense(), full_matrices=False)
        best = u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]
        torch.testing.assert_close(change.dense(), best)
        error = (whole[name].dense() - best).norm() / whole[name].dense().norm()
        assert relative_error(whole[name], change) == pytest.approx(float(error), abs=1e-7)


def test_a_rank_above_that_of_every_change_pads_nothing_unless_told_to():
    whole = changes()
    most = max(change.rank for change in whole.values())
    full = max(min(SHAPES[name][-2:]) for name in whole)
    assert most < full
    for change in within(Budget(full), whole).values():
        assert change.rank == most
    for change in within(Budget(full, uniform=True), whole).values():
        assert change.rank == full


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_an_energy_is_kept_by_few_numbers(energy):
    whole = changes()
    total = lost(whole, {n: LowRank.zero(SHAPES[n], torch.float64) for n in whole})
    kept = within(Budget(energy=energy), whole)
    assert lost(whole, kept) <= (1 - energy) * total + 1e-9 * total
    if energy < 0.95:
        assert sum(map(cost, kept.values())) < sum(map(cost, whole.values()))


@pytest.mark.parametrize("energy", [None, 0.3, 0.9, 0.999, 1.0])
def test_one_rank_for_all_keeps_as_much_and_is_the_smallest(energy):
    whole = changes()
    total = lost(whole, {n: LowRank.zero(SHAPES[n], torch.float64) for n in whole})
    kept = within(Budget(energy=energy, uniform=True), whole)
    (rank,) = {change.rank for change in kept.values()}
    allowed = (1 - (1 if energy is None else energy)) * total + 1e-9 * total
    assert lost(whole, kept) <= allowed
    assert rank == 1 or lost(whole, {n: c[: rank - 1] for n, c in kept.items()}) > allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_error_of_a_precision_is_told(dtype, rank):
    whole = changes()
    kept = within(Budget(rank, dtype=dtype), whole)
    for name, change in kept.items():
        assert torch.equal(change.A, change.A.to(dtype).double())
        expected = (whole[name].dense() - change.dense()).norm() / whole[name].dense().norm()
        assert relative_error(whole[name], change) == pytest.approx(
            float(expected), rel=1e-3, abs=1e-7
        )
        if rank is None:
            assert 0 < float(expected) < 2 * torch.finfo(dtype).eps


def test_what_is_no_budget_is_refused():
    for given, message in (
        ({"rank": 0}, "rank must be a positive integer"),
        ({"energy": 0.0}, "above 0 and at most 1"),
        ({"energy": 1.5}, "above 0 and at most 1"),
        ({"energy": math.nan}, "above 0 and at most 1"),
        ({"rank": 2, "energy": 0.5}, "not both"),
        ({"dtype": "float7"}, "dtype must be one of float16, .*got 'float7'"),
        ({"dtype": torch.int8}, "dtype must be one of float16, .*got torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            Budget(**given)
    with pytest.raises(ValueError, match=r"rank 9 is beyond that of any weight here \(8\)"):
        within(Budget(9), changes())
    large = {"a": LowRank(torch.full((3, 1), 1e4), torch.full((1, 3), 1e8))}
    with pytest.raises(ValueError, match=r"float16 cannot hold the change of a"):
        within(Budget(dtype=torch.float16), large)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_what_is_exported_is_what_was_kept_and_its_errors_are_told(tmp_path):
    base = Net()
    model: Any = get_peft_model(
        copy.deepcopy(base), RosaConfig(r=3, target_modules=["first", "last"])
    )
    for _ in range(3):
        moved(model)
        resample(model)
    exact = export_lora(model, tmp_path / "exact")
    assert exact == {"first": 0.0, "last": 0.0}
    errors = export_lora(model, tmp_path / "small", rank=2)
    lora: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    for name, layer in rosa_layers(model.base_model.model):
        whole = layer.whole_change("default").dense()
        found = lora.base_model.model.get_submodule(name).get_delta_weight("default")
        u, s, vh = torch.linalg.svd(whole)
        torch.testing.assert_close(found, u[:, :2] * s[:2] @ vh[:2], rtol=1e-3, atol=1e-4)
        assert errors[name] == pytest.approx(float((whole - found).norm() / whole.norm()), rel=1e-2)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert {*config["rank_pattern"].values()} == {2}
    kept = export_lora(model, tmp_path / "most", energy=0.9)
    assert all(0 <= error < 1 for error in kept.values())
    errors = export_lora(model, tmp_path / "half", uniform_rank=True, dtype=torch.bfloat16)
    assert all(0 < error < 0.01 for error in errors.values())
    state = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "half")
    config = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    assert {*config["rank_pattern"].values()} == {config["r"]}
    for name, layer in rosa_layers(model.base_model.model):
        whole = layer.whole_change("default").dense()
        found = lora.base_model.model.get_submodule(name).get_delta_weight("default")
        assert float((whole - found).norm() / whole.norm()) == pytest.approx(errors[name], rel=1e-2)


def test_the_command_exports_within_a_budget(tmp_path, capsys):
    trained_run(tmp_path, steps=4)
    capsys.readouterr()
    to = ["export", tmp_path / "run", "--to", "lora", "--output"]
    run(*to, tmp_path / "small", "--rank", 1)
    assert "the largest of" in " ".join(capsys.readouterr().out.split())
    run(*to, tmp_path / "most", "--energy", 0.99)
    run(*to, tmp_path / "whole", "--uniform-rank")
    run(*to, tmp_path / "half", "--uniform-rank", "--dtype", "bfloat16")
    sizes = [
        (tmp_path / name / "adapter_model.safetensors").stat().st_size
        for name in ("whole", "most", "half")
    ]
    assert max(sizes[1:]) < sizes[0]
    assert "got 'float7'" in fails(capsys, *to, tmp_path / "no", "--dtype", "float7")
    assert "rank 99 is beyond" in fails(capsys, *to, tmp_path / "no", "--rank", 99)
    assert "not both" in fails(capsys, *to, tmp_path / "no", "--rank", 1, "--energy", 0.5)
    merged = ["export", tmp_path / "run", "--to", "merged", "--output", tmp_path / "no"]
    assert "are for --to lora" in fails(capsys, *merged, "--rank", 1)
    assert not (tmp_path / "no").exists()
