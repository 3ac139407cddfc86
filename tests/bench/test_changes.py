"""What is recorded about the change of the weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rosa import RosaConfig, resample
from rosa.bench.train.changes import ChangeRecorder
from tests.models import Mlp

TARGETS = ["first", "middle"]


def state():
    return SimpleNamespace(epoch=1.0, global_step=1, log_history=[])


def recorded(model, before):
    recorder = ChangeRecorder(before, TARGETS)
    recorder.on_evaluate(None, state(), None, model=model)
    recorder.on_train_end(None, state(), None, model=model)
    return recorder


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)


@pytest.mark.parametrize("method", ["lora", "pissa", "rosa", "full"])
def test_ranks_and_spectra_are_those_of_the_change(method):
    before = Mlp(torch.float32)
    model = copy.deepcopy(before)
    if method == "rosa":
        model = get_peft_model(model, RosaConfig(r=1, target_modules=TARGETS))
        shake(model)
        resample(model)
        expected = {"first": 4, "middle": 4}  # two rounds, each left and entered
    elif method != "full":
        start = "pissa" if method == "pissa" else True
        config = LoraConfig(r=1, target_modules=TARGETS, init_lora_weights=start)
        model = get_peft_model(model, config)
        expected = {n: 2 if method == "pissa" else 1 for n in TARGETS}
    else:
        expected = {"first": 7, "middle": 6}
    weights = {n: p.clone() for n, p in model.named_parameters()}
    shake(model)
    changed = {n: p.clone() for n, p in model.named_parameters()}
    recorder = recorded(model, before)
    assert [(e["epoch"], e["ranks"]) for e in recorder.epochs] == [(1.0, expected)]
    assert all(torch.equal(p, changed[n]) for n, p in model.named_parameters())  # only looked at
    if method == "full":
        change = changed["first.weight"] - weights["first.weight"]
        found = torch.tensor(recorder.spectra["first"]["change"])
        torch.testing.assert_close(found, torch.linalg.svdvals(change))


def test_nothing_changed_is_rank_zero_and_few_layers_are_recorded():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(30)])
    recorder = ChangeRecorder(model, [str(i) for i in range(30)])
    recorder.on_evaluate(None, state(), None, model=model)
    ranks = recorder.epochs[0]["ranks"]
    assert 6 <= len(ranks) <= 12
    assert set(ranks.values()) == {0}
