"""`RosaCallback` in a real Trainer: when it draws, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from rosa import RosaCallback, RosaConfig, map_pretrained, watch
from rosa.layers.in_model import rosa_layers
from rosa.resampling.counting import ItemCounter
from tests.models import tiny_bert, tiny_gpt2


@pytest.fixture(scope="module")
def data():
    ids = torch.randint(50, (24, 6))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


class Draws(TrainerCallback):
    """Notes the draws at each step; must come after the RosaCallback."""

    def __init__(self):
        self.at = {}

    def on_step_begin(self, args, state, control, **kwargs):
        (_, layer), *_ = rosa_layers(kwargs["model"])
        self.at[state.global_step] = layer.adapters["default"].draws


def train(
    folder, data, every="epoch", base=None, resume=None, directions="svd", how=None, **options
):
    config = RosaConfig(
        r=2, directions=directions, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    mapped = isinstance(base, Path)
    if mapped:
        base = BertForSequenceClassification.from_pretrained(base)
    model = get_peft_model(copy.deepcopy(base) if base else tiny_bert(), config)
    if mapped:
        map_pretrained(model)
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        }
    )
    draws = Draws()
    callback = RosaCallback(every, **(how or {}))
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data, callbacks=[callback, draws]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback, draws.at


NUMBERS = 2 * 2 * (16 + 16) * 2  # of query and value in two layers at rank 2


@pytest.mark.parametrize("directions", ["svd", "gradient"])
@pytest.mark.parametrize(
    ("shortest", "options", "period"),
    [
        (2, {}, NUMBERS // 16 // 4),  # a label an example, four examples a step
        (2, {"gradient_accumulation_steps": 2}, NUMBERS // 16 // 8),
        (20, {"per_device_train_batch_size": 8}, 20),  # the shortest round
    ],
)
def test_auto_goes_by_the_items_for_each_trained_number(
    tmp_path, data, monkeypatch, directions, shortest, options, period
):
    monkeypatch.setattr("rosa.resampling.schedule.SHORTEST_ROUND", shortest)
    monkeypatch.setattr("rosa.resampling.schedule.ITEMS_A_NUMBER", 1 / 16)
    monkeypatch.setattr("rosa.resampling.callback.COUNTED", 2)
    _, callback, _ = train(
        tmp_path, data, "auto", directions=directions, max_steps=period + 5, **options
    )
    assert callback.period == period
    assert callback.drawn_at[0] == (period if directions == "svd" else min(shortest // 2, 4))


def test_auto_counts_the_tokens_that_a_decoder_learns(tmp_path):
    ids = torch.randint(50, (16, 8))
    labels = ids.clone()
    labels[:, :3] = -100
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    model = get_peft_model(tiny_gpt2(), RosaConfig(r=2, target_modules=["c_attn"]))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, use_cpu=True, report_to="none", disable_tqdm=True
    )
    callback = RosaCallback()
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert callback.period == max(math.ceil(2 * numbers / (8 * 5)), 64)


@pytest.mark.parametrize("batch", [{"input_ids": torch.zeros(3, 5)}, {}])
def test_examples_are_counted_where_there_are_no_labels(batch):
    class Model(nn.Module):
        def forward(self, **batch):
            return 0

    model = Model()
    counter = ItemCounter(model)
    model(**batch)
    with torch.no_grad():  # the reference of a preference's loss
        model(**batch)
    model.eval()(**batch)
    assert counter.stop() == (3 if batch else 1)
    model.train()(**batch)
    assert counter.stop() == (3 if batch else 1)  # it has stopped


def test_a_compiled_model_is_counted_too():
    class Model(nn.Module):
        def forward(self, labels):
            return labels * 2

    model = Model()
    counter = ItemCounter(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    labels = torch.tensor([[1, -100, 3], [4, 5, -100]])
    for _ in range(2):
        compiled(labels=labels)
    assert counter.stop() == 8
    torch.testing.assert_close(compiled(labels=labels), labels * 2)


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        ("epoch", {}, {3, 9, 15}),
        (12, {}, {4, 16}),
        (2, {}, {1, 3, 5, 7, 9, 11, 13, 15, 17}),
        ("never", {}, {4}),
        ("epoch", {"gradient_accumulation_steps": 2}, {1, 4, 7}),
        ("epoch", {"max_steps": 3}, set()),
    ],
)
def test_when_informed_subspaces_are_drawn(tmp_path, data, every, options, expected):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no gradient was seen")
        _, callback, draws = train(tmp_path, data, every, directions="gradient", **options)
    steps = sorted(draws)
    assert {s for s in steps if s and draws[s] > draws[s - 1]} == expected
    assert callback.drawn_at == sorted(expected)


@pytest.mark.parametrize(
    ("first", "steps", "drawn"), [(None, 60, 6), (None, 400, 20), (None, 30, 4), (9, 60, 9)]
)
def test_the_first_draw_waits_and_the_steps_before_it_are_watched(
    tmp_path, data, monkeypatch, first, steps, drawn
):
    """Unless told, for a tenth of the training, and no more than half a period."""
    seen = []

    def note(model):
        seen.append(watch(model))

    monkeypatch.setattr("rosa.resampling.callback.watch", note)
    how = {"first": first}
    _, callback, draws = train(tmp_path, data, 40, directions="gradient", max_steps=steps, how=how)
    expected = set(range(drawn, steps, 40))
    assert {s for s in sorted(draws) if s and draws[s] > draws[s - 1]} == expected
    assert callback.drawn_at == sorted(expected)
    assert len(seen) == 1  # what is drawn after it is random


@pytest.mark.parametrize("step", [6, 8])
def test_an_informed_run_resumed_after_its_first_draw_is_the_same_run(tmp_path, data, step):
    base = tiny_bert()
    options = {"base": base, "directions": "gradient", "save_strategy": "steps", "save_steps": step}
    whole, _, _ = train(tmp_path / "whole", data, **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
    resumed, callback, _ = train(tmp_path / "resumed", data, resume=checkpoint, **options)
    assert callback.drawn_at == [3, 9, 15]  # the first was before the checkpoint
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_without_what_was_seen_is_said_and_seen_anew(tmp_path, data):
    options = {"base": tiny_bert(), "directions": "gradient", "save_strategy": "steps"}
    options["save_steps"] = 2  # of the three steps before the first draw
    train(tmp_path / "whole", data, **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    with pytest.warns(UserWarning, match="lacks rosa_seen.safetensors"):  # another folder's
        _, _, draws = train(tmp_path / "resumed", data, resume=checkpoint, **options)
    steps = sorted(draws)
    assert steps[0] == 2
    assert {s for s in steps[1:] if draws[s] > draws[s - 1]} == {5, 9, 15}


@pytest.mark.parametrize("every", ["auto", 5, "epoch"])
@pytest.mark.parametrize("directions", ["gradient", "orthonormal"])
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run_to_the_last_bit(
    tmp_path, data, every, directions, monkeypatch
):
    """Also while it watches the gradient, or counts for its schedule."""
    monkeypatch.setattr("rosa.resampling.schedule.SHORTEST_ROUND", 3)
    monkeypatch.setattr("rosa.resampling.callback.COUNTED", 4)
    monkeypatch.setattr("rosa.resampling.schedule.ITEMS_A_NUMBER", 0.05)
    tiny_bert().save_pretrained(tmp_path / "base")
    options = {
        "base": tmp_path / "base",
        "directions": directions,
        "every": every,
        "how": {"first": 6},
        "save_strategy": "steps",
        "save_steps": 1,
        "warmup_steps": 3,
        "weight_decay": 0.1,
    }
    folder = tmp_path / "whole"
    whole, callback, _ = train(folder, data, **options)
    expected = {key: value.clone() for key, value in whole.model.state_dict().items()}
    assert len(callback.drawn_at) >= 2
    for step in (1, 2, 3, 4, 5, 6, 7, 12, 17):
        resume = str(folder / f"checkpoint-{step}")
        resumed, again, _ = train(folder, data, resume=resume, **options)
        assert (again.drawn_at, again.period) == (callback.drawn_at, callback.period)
        found = resumed.model.state_dict()
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not different, step


@pytest.mark.parametrize(
    ("every", "options", "expected"),
    [
        ("never", {}, set()),
        ("epoch", {}, {6, 12}),
        (4, {}, {4, 8, 12, 16}),
        (0.5, {}, {3, 6, 9, 12, 15}),
        (2.0, {}, {12}),
        ("epoch", {"gradient_accumulation_steps": 2}, {3, 6}),
        ("epoch", {"max_steps": 7}, {6}),
        ("epoch", {"num_train_epochs": 1}, set()),
    ],
)
def test_when_subspaces_are_drawn(tmp_path, data, every, options, expected):
    trainer, callback, draws = train(tmp_path, data, every, **options)
    steps = sorted(draws)
    assert {s for s in steps if s and draws[s] > draws[s - 1]} == expected
    assert callback.drawn_at == sorted(expected)
    (_, layer), *_ = rosa_layers(trainer.model)
    assert layer.adapters["default"].draws == 1 + len(expected)  # nothing after the last step


@pytest.mark.parametrize("checkpoint", [6, 8])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, data, checkpoint):
    base = tiny_bert()
    options = {"save_strategy": "steps", "save_steps": 2, "warmup_steps": 3}
    whole, _, draws = train(tmp_path / "whole", data, base=base, **options)
    resume = str(tmp_path / "whole" / f"checkpoint-{checkpoint}")
    parts, _, later = train(tmp_path / "parts", data, base=base, resume=resume, **options)
    assert later == {step: n for step, n in draws.items() if step >= checkpoint}
    ids = torch.randint(50, (4, 6))
    expected, found = (t.model.eval()(ids).logits for t in (whole, parts))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for (name, p), (_, q) in zip(
        whole.model.named_parameters(), parts.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("every", "draws"), [(5, {10, 15}), (7.0, set()), ("auto", {12, 15, 18}), ("never", set())]
)
def test_another_schedule_is_taken_from_a_checkpoint_on_and_said(
    tmp_path, data, every, draws, monkeypatch
):
    monkeypatch.setattr("rosa.resampling.schedule.SHORTEST_ROUND", 3)
    monkeypatch.setattr("rosa.resampling.schedule.ITEMS_A_NUMBER", 1e-6)
    monkeypatch.setattr("rosa.resampling.callback.COUNTED", 2)
    options = {"base": tiny_bert(), "save_strategy": "steps", "save_steps": 8, "max_steps": 20}
    train(tmp_path, data, every=7, **options)
    resume = str(tmp_path / "checkpoint-8")
    with pytest.warns(
        UserWarning, match=f"were made with every=7, those to come .* every={every!r}"
    ):
        _, callback, _ = train(tmp_path, data, every=every, resume=resume, **options)
    assert callback.drawn_at == [7, *sorted(draws)]


def test_the_best_model_is_loaded_at_the_end(tmp_path, data):
    trainer, *_ = train(
        tmp_path,
        data,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        learning_rate=0.3,  # diverges, so that the last epoch is not the best
    )
    best = trainer.state.best_model_checkpoint
    assert best is not None
    losses = [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)
    assert Path(best, "adapter_model.safetensors").exists()


def test_a_second_training_goes_on(tmp_path, data):
    trainer, callback, _ = train(tmp_path, data)
    trainer.train()
    assert callback.drawn_at == [6, 12]
    (_, layer), *_ = rosa_layers(trainer.model)
    assert layer.adapters["default"].draws == 1 + 4


@pytest.mark.parametrize("best", [6, 12, 18])
def test_after_the_best_model_a_second_training_has_no_moments_of_another_subspace(
    tmp_path, data, best, monkeypatch
):
    """Where that is of before the draw, at 12; of after it they are its own, and stay."""
    evaluate, held = Trainer.evaluate, {}

    def scored(trainer, *args, **kwargs):
        found = evaluate(trainer, *args, **kwargs)
        return {**found, "eval_loss": abs(trainer.state.global_step - best)}

    class Held(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            (_, layer), *_ = rosa_layers(kwargs["model"])
            factors, states = layer.adapters["default"].factors, kwargs["optimizer"].state
            held[state.global_step] = [factor in states for factor in factors]

    monkeypatch.setattr(Trainer, "evaluate", scored)
    saved = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer, *_ = train(tmp_path, data, every=12, **saved)
    assert trainer.state.best_model_checkpoint.endswith(f"-{best}")
    trainer.add_callback(Held)
    trainer.train()
    assert held[0] == [best == 18] * 2
    assert held[1] == [True] * 2


def test_a_resumed_run_draws_by_the_period_that_was_found(tmp_path, data, monkeypatch):
    """Though the steps that it counts itself have other items."""
    monkeypatch.setattr("rosa.resampling.schedule.SHORTEST_ROUND", 2)
    monkeypatch.setattr("rosa.resampling.schedule.ITEMS_A_NUMBER", 0.05)
    options = {"base": tiny_bert(), "save_strategy": "steps", "save_steps": 12}
    _, whole, draws = train(tmp_path / "whole", data, "auto", max_steps=18, **options)
    assert whole.drawn_at
    checkpoint = str(tmp_path / "whole" / "checkpoint-12")
    monkeypatch.setattr("rosa.resampling.schedule.ITEMS_A_NUMBER", 1000)
    how = {"resume": checkpoint, "max_steps": 18, **options}
    _, resumed, later = train(tmp_path / "resumed", data, "auto", **how)
    assert (resumed.period, resumed.drawn_at) == (whole.period, whole.drawn_at)
    assert later == {step: n for step, n in draws.items() if step >= 12}


@pytest.mark.parametrize("every", ["epochs", 0, -1, True, None, float("nan")])
def test_a_period_that_makes_no_sense_is_refused(every):
    with pytest.raises((ValueError, TypeError), match="every must be"):
        RosaCallback(every)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "some"}, "moments must be one of"),
        ({"first": 0}, "first must be at least 1"),
    ],
)
def test_other_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RosaCallback(**options)


def test_a_model_without_rosa_is_refused_before_training(tmp_path, data):
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS"))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[RosaCallback()])
    with pytest.raises(ValueError, match="has no ROSA layers"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("mask", [False, True])
def test_tokens_are_counted_where_the_trainer_computes_the_loss(mask):
    model = tiny_gpt2().train()
    counter = ItemCounter(model)
    ids = torch.randint(50, (3, 7))
    how = (
        {"attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [2]])).int()} if mask else {}
    )
    model(input_ids=ids, **how)  # as Trainer does with label smoothing, or a loss of its own
    assert counter.counted() == (13 if mask else 21)
    counter.stop()
    counter = ItemCounter(model)
    model(input_ids=ids, labels=ids, **how)
    assert counter.counted() == 21
    classifier = tiny_bert().train()
    counter = ItemCounter(classifier)
    classifier(input_ids=ids)
    assert counter.counted() == 3
