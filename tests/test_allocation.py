"""Ranks by weight, where the loss gradient lies, handed out at a draw."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from rosa import RosaCallback, RosaConfig, resample
from rosa.allocation import fill
from rosa.linear import rosa_layers
from tests.models import Mlp, tiny_bert

NAMES = ["first", "middle", "last"]


def bert(**options):
    names = ["query", "value", "dense"]
    config = {"r": 4, "allocate": True, "target_modules": names, "task_type": "SEQ_CLS", **options}
    return RosaConfig(**config)


def batches():
    ids = torch.randint(50, (8, 6))
    return [{"input_ids": ids[i::2], "labels": ids[i::2, 0] % 2} for i in range(2)]


def ranks_of(model):
    return {name: layer.r["default"] for name, layer in rosa_layers(model)}


def numbers(model):
    return sum(a.numel() for name, a in model.named_parameters() if ".rosa_" in name)


def test_the_most_energy_for_its_cost_comes_first_while_there_is_room():
    spectra = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([9.0, 8.0, 1.0])}
    assert fill({"a": 2, "b": 2}, {"a": 10, "b": 10}, spectra) == {"a": 2, "b": 2}
    assert fill({"a": 2, "b": 2}, {"a": 10, "b": 30}, spectra) == {"a": 3, "b": 1}
    assert fill({"a": 1, "b": 1}, {"a": 10, "b": 10}, spectra) == {"a": 1, "b": 1}
    assert fill({"a": 1, "b": 3}, {"a": 10, "b": 10}, spectra) == {"a": 2, "b": 2}
    # Where the gradient has no direction more, none is handed out.
    spectra["a"][1:] = 0
    assert fill({"a": 3, "b": 1}, {"a": 10, "b": 10}, spectra) == {"a": 1, "b": 3}


def test_a_weight_with_all_of_the_gradient_gets_the_ranks_that_others_spare():
    """Hardly any gradient comes to the two layers before one of tiny weights."""
    base, x = Mlp(), torch.randn(8, 7).double()
    with torch.no_grad():
        base.last.weight.mul_(1e-6)
    config = RosaConfig(r=2, allocate=True, target_modules=NAMES)
    model = get_peft_model(base, config)
    before = model(x)
    resample(model, batches=[x], loss=lambda m, x: (m(x) * x[:, :3]).sum())
    ranks = ranks_of(model)
    assert ranks["base_model.model.last"] == 3  # all that it can have
    assert ranks["base_model.model.first"] + ranks["base_model.model.middle"] < 4
    assert config.rank_pattern["^last"] == 3
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("moments", ["clear", "keep", "project"])
def test_ranks_move_within_the_same_number_of_parameters_and_the_model_computes_the_same(
    alpha, moments, tmp_path
):
    base = tiny_bert().double().eval()
    model = get_peft_model(copy.deepcopy(base), bert(alpha=alpha), autocast_adapter_dtype=False)
    model.eval()
    even, before = ranks_of(model), numbers(model)
    factors = [p for name, p in model.named_parameters() if ".rosa_" in name]
    optimizer = torch.optim.AdamW(factors, 1e-2)
    for _ in range(3):
        (one, other) = batches()
        model(**one).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logits = model(**other).logits
        assert resample(model, optimizer, batches=[one, other], moments=moments) == len(even)
        torch.testing.assert_close(model(**other).logits, logits)
        assert 0.9 * before < numbers(model) <= before
    assert ranks_of(model) != even
    assert [p for name, p in model.named_parameters() if ".rosa_" in name] == factors
    model(**one).loss.backward()
    optimizer.step()  # with state of the new shapes
    logits = model(**other).logits
    model.save_pretrained(str(tmp_path))
    for name, layer in rosa_layers(model):
        alpha_of_r = 1 if alpha is None else alpha / layer.r["default"]
        assert layer.scaling["default"] == alpha_of_r, name
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert ranks_of(loaded) == ranks_of(model)
    torch.testing.assert_close(loaded(**other).logits, logits)
    # Into a model whose ranks never moved, as a trainer does that is resumed.
    fresh = get_peft_model(copy.deepcopy(base), bert(alpha=alpha), autocast_adapter_dtype=False)
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    torch.testing.assert_close(fresh.eval()(**other).logits, logits)
    assert ranks_of(fresh) == ranks_of(model)
    moved = {rank for rank in ranks_of(model).values() if rank != 4}
    assert moved <= set(fresh.peft_config["default"].rank_pattern.values())
    other_way = get_peft_model(copy.deepcopy(base), bert(alpha=alpha), autocast_adapter_dtype=False)
    other_way.load_state_dict(model.state_dict())
    torch.testing.assert_close(other_way.eval()(**other).logits, logits)
    torch.testing.assert_close(other_way.merge_and_unload()(**other).logits, logits)


def train(folder, base, data, compute_metrics=None, resume=None, **options):
    model = get_peft_model(copy.deepcopy(base), bert())
    args = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **options,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **args),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[RosaCallback("never")],  # but for the first draw, at step 4
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_resumed_after_the_ranks_moved_is_the_uninterrupted_run(tmp_path):
    ids, base = torch.randint(50, (24, 6)), tiny_bert()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    whole = train(tmp_path / "a", base, data, save_strategy="epoch").model
    assert set(ranks_of(whole).values()) != {4}
    # They moved at step 4. Rounding differs, and a draw after it could turn over by that.
    checkpoint = str(tmp_path / "a" / "checkpoint-6")
    resumed = train(tmp_path / "b", base, data, resume=checkpoint)
    assert ranks_of(resumed.model) == ranks_of(whole)
    torch.testing.assert_close(resumed.model.state_dict(), whole.state_dict(), rtol=1e-3, atol=1e-3)


def test_the_best_model_may_be_of_ranks_from_before_they_moved(tmp_path):
    ids, base = torch.randint(50, (24, 6)), tiny_bert()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    scores = iter(range(100, 0, -1))  # the first is the best
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = train(
        tmp_path,
        base,
        data,
        lambda _: {"score": next(scores)},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **steps,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert set(ranks_of(trainer.model).values()) == {4}
    before = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)


def test_a_draw_that_fails_loses_nothing(monkeypatch):
    model = get_peft_model(tiny_bert(), bert())
    before = copy.deepcopy(model.state_dict())

    def fails(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("rosa.subspace.draw", fails)
    with pytest.raises(ValueError, match=r"no subspace of layer .* could be drawn"):
        resample(model, batches=batches())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert set(ranks_of(model).values()) == {4}


def test_where_ranks_cannot_be_handed_out_it_is_said():
    with pytest.raises(ValueError, match="use directions='gradient', or leave allocate out"):
        RosaConfig(directions="svd", allocate=True)
    model = get_peft_model(tiny_bert(), bert())
    with pytest.raises(ValueError, match="whole draws: leave spent or allocate out"):
        resample(model, batches=batches(), spent=0.5)
    assert set(ranks_of(model).values()) == {4}


def test_a_file_of_another_rank_is_refused_unless_ranks_are_handed_out(tmp_path):
    get_peft_model(tiny_bert(), bert(allocate=False, r=3)).save_pretrained(str(tmp_path))
    model = get_peft_model(tiny_bert(), bert(allocate=False))
    with pytest.raises(ValueError, match="the adapter does not fit the model"):
        model.load_adapter(str(tmp_path), "default")


def test_without_a_gradient_the_ranks_stay():
    model = get_peft_model(tiny_bert(), bert())
    with pytest.warns(UserWarning, match="no gradient was seen"):
        resample(model)
    assert set(ranks_of(model).values()) == {4}
