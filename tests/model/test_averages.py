"""Moving averages of models: as with any adapter between two draws, refused over one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rosa import RosaConfig, export_lora, export_merged, resample


def build():
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = RosaConfig(r=2, target_modules=["0", "2"], directions="orthonormal")
    return copy.deepcopy(base), get_peft_model(base, config)


def by_hand(ema, model):
    with torch.no_grad():
        for p, q in zip(ema.parameters(), model.parameters(), strict=True):
            p.lerp_(q, 0.2)


def swa(model):
    average = AveragedModel(model)
    return average.module, lambda: average.update_parameters(model)


def ema(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    return average.module, lambda: average.update_parameters(model)


def hand(model):
    average = copy.deepcopy(model)
    return average, lambda: by_hand(average, model)


def steps(model, update, count):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(count):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        update()


AVERAGES = pytest.mark.parametrize("make", [swa, ema, hand])


@AVERAGES
def test_an_average_between_draws_is_saved_and_loaded(make, tmp_path):
    base, model = build()
    average, update = make(model)
    steps(model, update, 5)
    x = torch.randn(4, 6)
    expected = average(x)
    assert not torch.allclose(expected, model(x))
    average.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(x), expected)


@AVERAGES
@pytest.mark.parametrize("draws", [1, 2])
def test_an_average_over_a_draw_is_refused_and_the_model_is_not_touched(make, draws, tmp_path):
    _, model = build()
    average, update = make(model)
    steps(model, update, 4)
    for _ in range(draws):
        resample(model)
        steps(model, update, 3)
    x = torch.randn(4, 6)
    for use in (
        lambda: average(x),
        lambda: average.save_pretrained(str(tmp_path / "saved")),
        lambda: average.state_dict(),
        lambda: average.merge_adapter(),
        lambda: export_lora(average, tmp_path / "lora"),
        lambda: export_merged(average, tmp_path / "merged"),
    ):
        with pytest.raises(ValueError, match="an average over models"):
            use()
    with pytest.warns(UserWarning, match="is taken for a change of the pretrained weight"):
        copy.deepcopy(average).unload()
    assert torch.isfinite(model(x)).all()
    model.save_pretrained(str(tmp_path / "model"))
