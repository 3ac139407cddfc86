"""DeepSpeed's ZeRO 1 and 2, whose optimizer steps flat parts: as in one process."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainingArguments

import rosa
from rosa import RosaCallback, RosaConfig
from rosa.layers.in_model import rosa_layers
from tests.models import tiny_gpt2, tiny_llama
from tests.processes import all_equal, in_processes, without_gloo

pytest.importorskip("deepspeed")
pytestmark = [
    without_gloo,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles on the CPU"),
]


def adapted(kind=tiny_gpt2, **options):
    """A model that is the same in every process."""
    torch.manual_seed(0)
    base = kind().eval()
    torch.manual_seed(1)
    options = {"target_modules": "all-linear", **options}
    return get_peft_model(base, RosaConfig(r=2, **options))


def adam(model):
    """One whose steps follow the gradient, for its sign is in float32 often that of a rounding."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)


def momentum(model):
    return SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1, momentum=0.9)


def in_parts(model, optimizer, zero, **config):
    """DeepSpeed's engine and optimizer, on the CPU."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero if isinstance(zero, dict) else {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # else DeepSpeed cuts the norm to 1
        **config,
    }
    deepspeed.init_distributed("gloo")
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[:2]


def batches():
    torch.manual_seed(3)
    return torch.randint(0, 50, (8, 4, 12))


def trained(model, optimizer, moments, engine=None):
    """The changes of the weights after some steps and two draws."""
    rank = 0 if engine is None else distributed.get_rank()
    for step, whole in enumerate(batches()):
        if step == 2:
            rosa.watch(engine or model)
        mine = whole if engine is None else whole[2 * rank : 2 * rank + 2]
        loss = (engine or model)(input_ids=mine, labels=mine).loss
        if engine is None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(loss)
            engine.step()
        if step in (3, 5):
            rosa.resample(engine or model, optimizer, moments=moments)
    return {n: layer.get_delta_weight("default") for n, layer in rosa_layers(model)}


WAYS = {
    "adamw": (adam, {}),
    "momentum": (momentum, {}),
    "one factor": (adam, {"trained": "B"}),
    "two groups of factors": (
        lambda m: AdamW(
            [
                {"params": [p for p in m.parameters() if p.requires_grad][::2], "lr": 2e-2},
                {"params": [p for p in m.parameters() if p.requires_grad][1::2]},
            ],
            lr=1e-2,
            eps=1e-2,
        ),
        {},
    ),
}


def _train(rank, zero, moments, expected):
    for (way, kind), changes in expected.items():
        optimizer, options = WAYS[way]
        model = adapted(kind, **options)
        engine, parts = in_parts(model, optimizer(model), zero)
        for name, change in trained(model, parts, moments, engine).items():
            assert all_equal(change), name
            error = (change - changes[name]).norm() / changes[name].norm()
            assert error < 1e-4, (way, kind.__name__, name, error)


@pytest.mark.parametrize(
    ("stage", "moments"), [(1, "clear"), (1, "keep"), (2, "clear"), (2, "keep")]
)
@pytest.mark.parametrize("config", [{}, {"offload_optimizer": {"device": "cpu"}}], ids=str)
def test_two_processes_train_what_one_does(stage, moments, config, tmp_path):
    expected = {}
    for way, (optimizer, options) in WAYS.items():
        for kind in (tiny_gpt2, tiny_llama):
            model = adapted(kind, **options)
            expected[way, kind] = trained(model, optimizer(model), moments)
    in_processes(2, tmp_path, _train, {"stage": stage, **config}, moments, expected)


def _draw(rank, precision):
    model = adapted()
    engine, optimizer = in_parts(model, adam(model), 2, **precision)
    rows = batches()[0]
    for _ in range(2):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    rosa.resample(engine, optimizer)
    drawn = {f: f.detach().clone() for f in model.parameters() if f.requires_grad}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()  # writes the parts over the parameters
    assert all(torch.equal(f, value) for f, value in drawn.items())


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_what_is_drawn_stays_drawn(precision, tmp_path):
    in_processes(2, tmp_path, _draw, precision)


def _refuse(rank):
    model = adapted(modules_to_save=["ln_f"])
    engine, optimizer = in_parts(model, adam(model), 2)
    rows = batches()[0]

    def refused(match, *args, **kwargs):
        before = {n: layer.get_delta_weight("default") for n, layer in rosa_layers(model)}
        with pytest.raises(ValueError, match=match):
            rosa.resample(engine, optimizer, *args, **kwargs)
        for name, layer in rosa_layers(model):
            assert torch.equal(layer.get_delta_weight("default"), before[name])
            assert layer.adapters["default"].draws == 1

    refused(r"2 other parameters .* moments='keep'")
    refused("no batches", moments="keep", batches=[{"input_ids": rows, "labels": rows}])
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    refused("no step has used yet", moments="keep")
    engine.step()
    rosa.resample(engine, optimizer, moments="keep")


def test_what_would_be_silently_wrong_is_refused(tmp_path):
    in_processes(2, tmp_path, _refuse)


def _keep_points(rank):
    model = adapted()
    engine, optimizer = in_parts(model, adam(model), 2)
    for group in optimizer.optimizer.param_groups:
        for part in group["params"]:  # as Lookahead keeps it
            optimizer.optimizer.state[part]["slow_params"] = part.detach().clone()
    with pytest.raises(ValueError, match="a value of the factor itself"):
        rosa.resample(engine, optimizer, moments="keep")
    with pytest.raises(ValueError, match="slow_params, of which ROSA does not know"):
        rosa.resample(engine, optimizer)


def test_an_optimizer_that_keeps_points_in_parts_is_refused(tmp_path):
    in_processes(2, tmp_path, _keep_points)


def _in_turn(rank):
    model = adapted()
    zero = {"stage": 2, "round_robin_gradients": True}  # another order than its own map says
    engine, optimizer = in_parts(model, adam(model), zero)
    with pytest.raises(ValueError, match=r"round_robin_gradients|process 1"):
        rosa.resample(engine, optimizer)


def test_parts_in_another_order_are_refused(tmp_path):
    in_processes(2, tmp_path, _in_turn)


def _apart(rank):
    model = adapted(modules_to_save=["ln_f"])
    head, factors = (
        [p for n, p in model.named_parameters() if p.requires_grad and ("rosa" in n) == of]
        for of in (False, True)
    )
    engine, optimizer = in_parts(model, AdamW([{"params": head}, {"params": factors}], lr=1e-3), 2)
    rows = batches()[0]
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
    rosa.resample(engine, optimizer)
    head, factors = optimizer.optimizer.state.values()
    assert (head["step"], factors["step"]) == (1, 0)
    assert head["exp_avg"].any()
    assert not factors["exp_avg"].any()
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
    assert factors["step"] == 1


def test_moments_of_factors_in_a_group_of_their_own_are_cleared(tmp_path):
    in_processes(2, tmp_path, _apart)


def _in_stage_3(rank):
    model = adapted()
    engine, optimizer = in_parts(model, adam(model), 3)
    with pytest.raises(ValueError, match=r"sharded over processes.*ZeRO 1 or 2"):
        rosa.resample(engine, optimizer)


def test_stage_3_is_refused(tmp_path):
    in_processes(2, tmp_path, _in_stage_3)


ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def _by_trainer(rank, folder, deepspeed, steps, resume=None):
    os.environ["DS_ACCELERATOR"] = "cpu"
    model, callback = adapted(), RosaCallback(every=5)
    arguments = TrainingArguments(
        output_dir=f"{folder}/{'zero' if deepspeed else 'plain'}",
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        save_steps=8,
        report_to=[],
        use_cpu=True,
        deepspeed=deepspeed,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in batches().flatten(0, 1)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    assert callback.drawn_at == [step for step in (2, 7, 12) if step < steps]
    changes = {n: layer.get_delta_weight("default") for n, layer in rosa_layers(model)}
    if rank == 0:
        torch.save(changes, f"{folder}/{'zero' if deepspeed else 'plain'}-{steps}.pt")
    sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()


def test_trainer_trains_in_parts_what_it_trains_without_and_resumes(tmp_path):
    for part, (deepspeed, steps, resume) in enumerate(
        [(None, 16, None), (ZERO_2, 9, None), (ZERO_2, 16, True)]
    ):
        (tmp_path / str(part)).mkdir()
        in_processes(2, tmp_path / str(part), _by_trainer, str(tmp_path), deepspeed, steps, resume)
    plain, zero = (torch.load(tmp_path / f"{kind}-16.pt") for kind in ("plain", "zero"))
    for name, change in plain.items():
        assert (change - zero[name]).norm() < 1e-4 * change.norm(), name
