"""Data-parallel training in real processes: one of them draws a layer for all."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from rosa import RosaCallback, RosaConfig, resample, watch
from rosa.algebra import subspace
from rosa.layers import drawing
from rosa.layers.in_model import rosa_layers
from rosa.resampling.sharing import shares
from tests.models import Mlp, tiny_bert
from tests.processes import all_equal, in_processes, without_gloo

pytestmark = without_gloo
TARGETS = ["query", "key", "value", "dense"]
DRAW = subspace.draw


def adapted(directions, dtype=torch.float64):
    """A model that is the same in every process."""
    torch.manual_seed(0)
    config = RosaConfig(r=2, directions=directions, target_modules=TARGETS)
    return get_peft_model(tiny_bert().to(dtype), config)


def state(model):
    """Factors, offsets and weights."""
    parts = [p.detach() for p in model.parameters()]
    for _, layer in rosa_layers(model):
        for adapter in layer.adapters.values():
            parts += [adapter.terms.A, adapter.terms.B]
    return torch.cat([part.flatten() for part in parts])


def train(model, wrapped, optimizer, rank, size, after_draw=lambda: None):
    """Five steps, of 8 sequences among all processes, two with a draw; the whole batch's losses."""
    data, losses = torch.Generator().manual_seed(1), []
    for step in range(5):
        if step in (0, 2):
            watch(wrapped)
        if step in (2, 4):
            resample(wrapped, optimizer)
            after_draw()
        ids = torch.randint(50, (8, 6), generator=data)[rank::size]
        optimizer.zero_grad()
        loss = wrapped(input_ids=ids, labels=ids[:, 0] % 2).loss
        loss.backward()
        optimizer.step()
        if size > 1:
            distributed.all_reduce(loss.detach())
        losses.append(loss.detach() / size)
    return torch.stack(losses)


def adamw(model, sharded=False):
    factors = [p for p in model.parameters() if p.requires_grad]
    if sharded:
        return ZeroRedundancyOptimizer(factors, torch.optim.AdamW, lr=1e-2)
    return torch.optim.AdamW(factors, lr=1e-2)


@contextmanager
def unlike_machines(rank, drawn):
    """Every other process finds other signs, as another machine may; `drawn` counts its draws."""

    def draw(*args, **kwargs):
        drawn.append(1)
        a, b = DRAW(*args, **kwargs)
        return (-a, -b) if rank % 2 else (a, b)

    with mock.patch.object(drawing.subspace, "draw", draw):
        yield


def hold_the_same(rank, directions, size):
    alone = adapted(directions)
    expected = train(alone, alone, adamw(alone), 0, 1)
    model = adapted(directions)
    wrapped = DistributedDataParallel(model)
    optimizer = adamw(model, sharded=directions == "orthonormal")

    def after_draw():
        assert all_equal(state(model))
        held = (optimizer.optim if directions == "orthonormal" else optimizer).state
        factors = {f for _, layer in rosa_layers(model) for f in layer.parameters()}
        assert not factors & held.keys()

    losses = train(model, wrapped, optimizer, rank, size, after_draw)
    assert all_equal(state(model))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(state(model), state(alone), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("directions", "size"), [("gradient", 2), ("svd", 4), ("orthonormal", 2)])
def test_processes_hold_the_same_model_as_one_process_would(tmp_path, directions, size):
    in_processes(size, tmp_path, hold_the_same, directions, size)


def draw_for_all(rank, size):
    model, drawn = adapted("svd"), []
    layers = len(list(rosa_layers(model)))
    with unlike_machines(rank, drawn):
        for _ in range(2):
            before = model(input_ids=torch.arange(12).view(2, 6)).logits
            resample(model)
            assert all_equal(state(model))
            torch.testing.assert_close(model(input_ids=torch.arange(12).view(2, 6)).logits, before)
    counts = [torch.zeros(()) for _ in range(size)]
    distributed.all_gather(counts, torch.tensor(float(len(drawn))))
    assert sum(counts) == 2 * layers
    assert all(counts)
    for dtype in (torch.bfloat16, torch.float16):
        model = adapted("orthonormal", dtype)
        with unlike_machines(rank, drawn):
            resample(model)
        assert all_equal(state(model).float())
    out_of_step(rank)
    fail(rank)


def out_of_step(rank):
    """A count, a config, a watch: each is found out in all processes, and nothing is drawn."""
    for what, change in {
        "draws": lambda one: setattr(one, "draws", one.draws + rank),
        "seed": lambda one: setattr(one.config, "seed", rank),
        "watched": lambda one: one.watch(torch.zeros(())) if rank else None,
    }.items():
        model = adapted("svd")
        _, layer = list(rosa_layers(model))[3]
        change(layer.adapters["default"])
        refuses(model, f"{what} of adapter 'default' in layer .*(query|key|value|dense)")


def refuses(model, message):
    before, draws = state(model), [la.adapters["default"].draws for _, la in rosa_layers(model)]
    with pytest.raises(ValueError, match=message):
        resample(model)
    assert torch.equal(state(model), before)
    assert [la.adapters["default"].draws for _, la in rosa_layers(model)] == draws


def fail(rank):
    """A draw, a check of the model, and a batch that fail in process 1."""
    model = adapted("svd")

    def broken(*args, **kwargs):
        raise RuntimeError("did not converge")

    with mock.patch.object(drawing.subspace, "draw", broken if rank == 1 else DRAW):
        message = "no subspace of layer .*did not converge"
        refuses(model, message if rank == 1 else f"failed in process 1: {message}")
    assert resample(model) == len(list(rosa_layers(model)))
    assert all_equal(state(model))
    model = adapted("gradient")
    batches = [{"input_ids": torch.zeros(1, 3, dtype=torch.long)}] if rank == 1 else []
    with pytest.raises(ValueError, match="gave no loss"):
        resample(model, batches=batches)
    if rank == 1:
        with torch.no_grad():
            next(rosa_layers(model))[1].rosa_A["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        resample(model)


@pytest.mark.parametrize("size", [2, 4])
def test_each_layer_is_drawn_in_one_process_for_all(tmp_path, size):
    in_processes(size, tmp_path, draw_for_all, size)


def train_their_own(rank):
    """Processes 0 and 2 train the same adapter, process 1 another, and its model is smaller."""
    model = (
        adapted("gradient")
        if rank != 1
        else get_peft_model(
            Mlp(), RosaConfig(r=2, target_modules=["first", "last"], directions="svd")
        )
    )
    alone = copy.deepcopy(model)
    drawn = []
    if rank == 1:
        resample(model)
    else:
        watch(model)
        ids = torch.arange(rank, rank + 12).view(2, 6)
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        with unlike_machines(rank // 2, drawn):
            resample(model)
        assert 0 < len(drawn) < len(list(rosa_layers(model)))
    found = [None] * 3
    distributed.all_gather_object(found, state(model))
    assert torch.equal(found[0], found[2])
    distributed.barrier()
    if rank == 1:
        with mock.patch.object(distributed, "is_initialized", return_value=False):
            resample(alone)
        assert torch.equal(state(alone), state(model))


def test_processes_that_train_something_else_draw_by_themselves(tmp_path):
    in_processes(3, tmp_path, train_their_own)


def run_trainer(rank, size, folder, resume_from):
    """Twelve steps of 8 sequences; watched from the first, drawn at 5 and 9, saved after 3."""
    model = adapted("gradient")
    data = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (48, 6), generator=data)
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=8 // size, max_steps=12, learning_rate=1e-2,
        average_tokens_across_devices=False, save_steps=3, logging_steps=1, seed=3, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    callback = RosaCallback(every=4, first=5)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume_from)
    assert callback.drawn_at == [5, 9]
    assert all_equal(state(model))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if rank == 0:
        torch.save((losses, state(model)), folder / "found.pt")


@pytest.mark.parametrize("size", [1, 4])
def test_a_run_of_two_processes_is_gone_on_with_in_another_number(tmp_path, size):
    for name, count, source in (("two", 2, None), ("more", size, "two/checkpoint-3")):
        (tmp_path / name).mkdir()
        source = source and str(tmp_path / source)
        in_processes(count, tmp_path / name, run_trainer, count, tmp_path / name, source)
    (expected, whole), (losses, found) = (
        torch.load(tmp_path / n / "found.pt") for n in ("two", "more")
    )
    assert losses == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def leave(rank):
    """Process 1 ends without a draw."""
    if rank == 0:
        with pytest.raises(ValueError, match="has ended, or did not come"):
            resample(adapted("svd"))


def test_a_process_that_has_ended_is_not_waited_for(tmp_path):
    in_processes(2, tmp_path, leave)


def test_works_are_shared_by_their_size():
    assert shares([1, 8, 3, 4], 2) == [1, 0, 1, 1]
    assert sorted(shares([1.0] * 8, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]
