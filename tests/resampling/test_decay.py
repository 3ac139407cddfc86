"""Weight decay toward the drawn factors: on AdamW itself, over draws, files and the Trainer."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from rosa import RosaCallback, RosaConfig, resample
from rosa.layers.in_model import rosa_layers
from rosa.resampling.counting import ItemCounter
from rosa.resampling.decay import DecayTowardDrawn
from tests.helpers import adapters_of
from tests.models import Mlp, tiny_bert

LR, DECAY = 0.05, 0.4


def adapted(**options):
    config = RosaConfig(
        r=2, directions="svd", target_modules=["first", "middle"], modules_to_save=["last"]
    )
    model = get_peft_model(Mlp(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, **options)


def factors(model):
    layers = [layer for _, layer in rosa_layers(model)]
    return [f for layer in layers for f in (layer.rosa_A["default"], layer.rosa_B["default"])]


def move(model):
    """As if the adapter had learned something."""
    with torch.no_grad():
        for factor in factors(model):
            factor.add_(torch.randn_like(factor))


def step(model, optimizer):
    """A step without gradients: the decay alone."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_factors_decay_toward_what_was_drawn_and_others_toward_zero():
    model, optimizer = adapted()
    drawn = [f.detach().clone() for f in factors(model)]
    DecayTowardDrawn(optimizer, adapters_of(model, optimizer))
    move(model)
    moved = [f.detach().clone() for f in factors(model)]
    head = model.base_model.model.last.modules_to_save["default"].weight
    before = head.detach().clone()
    step(model, optimizer)
    for factor, start, place in zip(factors(model), drawn, moved, strict=True):
        close(factor.detach(), place - LR * DECAY * (place - start))
    close(head.detach(), before * (1 - LR * DECAY))


def test_after_a_draw_it_is_toward_the_new_factors():
    model, optimizer = adapted()
    decay = DecayTowardDrawn(optimizer, adapters_of(model, optimizer))
    move(model)
    resample(model, optimizer)
    decay.refresh()
    drawn = [f.detach().clone() for f in factors(model)]
    for _ in range(50):
        step(model, optimizer)
    close([f.detach() for f in factors(model)], drawn)
    decay.stop()
    step(model, optimizer)
    close([f.detach() for f in factors(model)], [d * (1 - LR * DECAY) for d in drawn])


@pytest.mark.parametrize("draws", [0, 1, 9])
def test_what_was_drawn_is_known_from_a_file_and_after_the_offset_is_compressed(draws):
    model, optimizer = adapted()
    for _ in range(draws):
        move(model)
        resample(model, optimizer)
    drawn = [f.detach().clone() for f in factors(model)]
    move(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    again, optimizer = adapted()
    again.load_state_dict(state)
    for i, (_, layer) in enumerate(rosa_layers(again)):
        found = layer.adapters["default"].drawn()
        close(found.A, drawn[2 * i])
        close(found.B, drawn[2 * i + 1] * layer.adapters["default"].scaling)


def test_factors_drawn_at_zero_have_no_other_origin():
    model = get_peft_model(Mlp(), RosaConfig(directions="zero", target_modules=["first"]))
    ((_, layer),) = rosa_layers(model)
    assert layer.adapters["default"].drawn() is None


def test_a_decay_that_goes_through_the_gradient_is_left_with_a_warning():
    model, _ = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    drawn = [f.detach().clone() for f in factors(model)]
    optimizer = torch.optim.SGD(trained, lr=LR, weight_decay=DECAY)
    with pytest.warns(UserWarning, match="weight decay of SGD pulls"):
        DecayTowardDrawn(optimizer, adapters_of(model, optimizer))
    step(model, optimizer)
    close([f.detach() for f in factors(model)], [d * (1 - LR * DECAY) for d in drawn])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DecayTowardDrawn(torch.optim.SGD(trained, lr=LR), adapters_of(model))


def test_in_the_trainer(tmp_path):
    """Of a loss of 0 only the decay is left."""
    ids = torch.randint(50, (16, 6)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": [0] * 16})
    config = RosaConfig(
        r=2, directions="orthonormal", target_modules=["query"], task_type="SEQ_CLS"
    )
    model = get_peft_model(tiny_bert(), config)
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        learning_rate=LR,
        weight_decay=DECAY,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )

    class NoLoss(Trainer):
        def compute_loss(self, model, inputs, **_):
            return model(**inputs).logits.sum() * 0

    callback = RosaCallback(4)
    trainer = NoLoss(model, args, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert callback.drawn_at == [4, 8]
    for _, layer in rosa_layers(model):
        drawn, learned = layer.adapters["default"].drawn(), layer.adapters["default"].learned()
        torch.testing.assert_close(learned.A, drawn.A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(learned.B, drawn.B, rtol=1e-4, atol=1e-6)


def seen_to(model, optimizer):
    """As a training begins, or goes on with other groups or adapters."""
    DecayTowardDrawn(optimizer, adapters_of(model, optimizer))


def stays(model, optimizer):
    """Whether the decay alone leaves the factors where they are."""
    before = [f.detach().clone() for f in factors(model)]
    for _ in range(20):
        step(model, optimizer)
    close([f.detach() for f in factors(model)], before)


def test_one_optimizer_of_two_models():
    one, optimizer = adapted()
    two, _ = adapted()
    optimizer.add_param_group({"params": [p for p in two.parameters() if p.requires_grad]})
    for model in (one, two):
        seen_to(model, optimizer)
        resample(model, optimizer)
    stays(one, optimizer)
    stays(two, optimizer)


def test_adapters_that_take_turns():
    model, optimizer = adapted()
    model.add_adapter("other", RosaConfig(r=2, directions="svd", target_modules=["first"]))
    held = (d for _, la in rosa_layers(model) for d in (la.rosa_A, la.rosa_B))
    others = [factor for each in held for name, factor in each.items() if name == "other"]
    optimizer.add_param_group({"params": others})
    seen_to(model, optimizer)
    resample(model, optimizer)
    model.set_adapter("other")
    seen_to(model, optimizer)
    resample(model, optimizer)
    model.set_adapter("default")
    stays(model, optimizer)


def test_decay_that_begins_later():
    model, optimizer = adapted()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    seen_to(model, optimizer)
    resample(model, optimizer)
    for group in optimizer.param_groups:
        group["weight_decay"] = DECAY
    seen_to(model, optimizer)
    resample(model, optimizer)
    stays(model, optimizer)
    resample(model)  # which names no optimizer
    stays(model, optimizer)


def test_a_state_dict_that_is_loaded_after_a_draw():
    model, optimizer = adapted()
    seen_to(model, optimizer)
    resample(model, optimizer)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    resample(model, optimizer)
    model.load_state_dict(state)
    stays(model, optimizer)


def test_an_optimizer_is_not_kept():
    model, optimizer = adapted()
    seen_to(model, optimizer)
    resample(model, optimizer)
    twin = copy.deepcopy(model)
    assert factors(twin)
    found = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_move_nothing(fused):
    torch.manual_seed(0)
    config = RosaConfig(r=2, directions="svd", target_modules=["first", "middle"])
    model = get_peft_model(Mlp(torch.float32), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, fused=fused)
    seen_to(model, optimizer)
    resample(model, optimizer)
    move(model)
    before = [f.detach().clone() for f in factors(model)]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.randn(4, 7)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert all(map(torch.equal, [f.detach() for f in factors(model)], before))


def test_a_training_that_was_interrupted_gives_nothing_back_any_more():
    model, optimizer = adapted()
    drawn = [f.detach().clone() for f in factors(model)]
    kept = [DecayTowardDrawn(optimizer, adapters_of(model, optimizer)) for _ in range(3)]
    for _ in range(20):
        step(model, optimizer)
    for now, before in zip(factors(model), drawn, strict=True):
        close(now, before)
    kept[0].stop()
    step(model, optimizer)
    close(factors(model)[0], drawn[0])
    kept[2].stop()
    step(model, optimizer)
    close(factors(model)[0], drawn[0] * (1 - LR * DECAY))
    kept.append(DecayTowardDrawn(optimizer, adapters_of(model, optimizer)))
    for _ in range(20):
        step(model, optimizer)
    assert (factors(model)[0] - drawn[0]).norm() < (LR * DECAY) * drawn[0].norm()


def test_items_are_counted_by_the_last_training_alone():
    model = Mlp().train()
    first = ItemCounter(model)
    second = ItemCounter(model)
    model(torch.randn(5, 7).double())
    assert (first.counted(), second.stop()) == (0, 5)
    model(torch.randn(5, 7).double())
    assert second.counted() == 5
