"""DeepSpeed's ZeRO, whose optimizer steps flat parts: as in one process."""

from __future__ import annotations

import copy
import os
import shutil
import sys

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import distributed, nn
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainingArguments
from transformers.initialization import no_init_weights

import rosa
from rosa import RosaCallback, RosaConfig
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.sharding import whole, write
from tests.helpers import moved
from tests.models import tiny_gpt2, tiny_llama
from tests.processes import all_equal, in_processes, without_gloo
from tests.targets import KINDS, inputs_of, outputs

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


def take_step(loss, optimizer, engine):
    if engine is None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        engine.backward(loss)
        engine.step()


def batches():
    torch.manual_seed(3)
    return torch.randint(0, 50, (8, 4, 12))


def trained(model, optimizer, moments, engine=None):
    """The changes of the weights after some steps and two draws."""
    rank = 0 if engine is None else distributed.get_rank()
    for step, rows in enumerate(batches()):
        if step == 2:
            rosa.watch(engine or model)
        mine = rows if engine is None else rows[2 * rank : 2 * rank + 2]
        loss = (engine or model)(input_ids=mine, labels=mine).loss
        take_step(loss, optimizer, engine)
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


ON_CPU = {"device": "cpu"}
IN_PARTS = {"stage": 3, "stage3_param_persistence_threshold": 0}  # the smallest weights too
ZEROS = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 1, "offload_optimizer": ON_CPU},
    {"stage": 2, "offload_optimizer": ON_CPU},
    IN_PARTS,
    {**IN_PARTS, "offload_optimizer": ON_CPU, "offload_param": ON_CPU},
    {**IN_PARTS, "sub_group_size": 100},
]


@pytest.mark.parametrize("moments", ["clear", "keep"])
@pytest.mark.parametrize("zero", ZEROS, ids=str)
def test_two_processes_train_what_one_does(zero, moments, tmp_path):
    expected = {}
    for way, (optimizer, options) in WAYS.items():
        for kind in (tiny_gpt2, tiny_llama):
            model = adapted(kind, **options)
            expected[way, kind] = trained(model, optimizer(model), moments)
    in_processes(2, tmp_path, _train, zero, moments, expected)


def _draw(rank, zero, precision):
    model = adapted()
    engine, optimizer = in_parts(model, adam(model), zero, **precision)
    rows = batches()[0]
    for _ in range(2):
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    rosa.resample(engine, optimizer)
    drawn = {f: whole(f).clone() for f in model.parameters() if f.requires_grad}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()  # writes the parts over the parameters
    assert all(torch.equal(whole(f), value) for f, value in drawn.items())


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", [2, IN_PARTS], ids=["stage 2", "stage 3"])
def test_what_is_drawn_stays_drawn(zero, precision, tmp_path):
    in_processes(2, tmp_path, _draw, zero, precision)


def _refuse(rank, zero):
    model = adapted(modules_to_save=["ln_f"])
    engine, optimizer = in_parts(model, adam(model), zero)
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


@pytest.mark.parametrize("zero", [2, IN_PARTS], ids=["stage 2", "stage 3"])
def test_what_would_be_silently_wrong_is_refused(zero, tmp_path):
    in_processes(2, tmp_path, _refuse, zero)


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


def _apart(rank, zero):
    model = adapted(modules_to_save=["ln_f"])
    head, factors = (
        [p for n, p in model.named_parameters() if p.requires_grad and ("rosa" in n) == of]
        for of in (False, True)
    )
    groups = [{"params": head}, {"params": factors}]
    engine, optimizer = in_parts(model, AdamW(groups, lr=1e-3), zero)
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


@pytest.mark.parametrize("zero", [2, IN_PARTS], ids=["stage 2", "stage 3"])
def test_moments_of_factors_in_a_group_of_their_own_are_cleared(zero, tmp_path):
    in_processes(2, tmp_path, _apart, zero)


def _verbs(rank, folder, whole_models):
    """Every verb on a model in parts, against the same on one that is not."""
    rows = batches()[0][:2]
    for kind, (state, given) in whole_models.items():
        model = adapted(kind)
        model.add_adapter("other", model.peft_config["default"])
        engine, _ = in_parts(model, adam(model), IN_PARTS)
        weights = [layer.base_weight for _, layer in rosa_layers(model)]
        for name, layer in rosa_layers(model):
            for factor, values in zip(layer.adapters["default"].factors, state[name], strict=True):
                write(factor, values)
        rosa.resample(engine)
        assert all(weight.parameter.numel() == 0 for weight in weights)

        def logits(model=engine):
            with torch.no_grad():
                return model(input_ids=rows).logits

        learned, pretrained = given
        for _ in range(2):
            torch.testing.assert_close(logits(), learned, atol=1e-4, rtol=1e-4)
            with model.disable_adapter():
                torch.testing.assert_close(logits(), pretrained, atol=1e-4, rtol=1e-4)
            model.merge_adapter()
            torch.testing.assert_close(logits(), learned, atol=1e-4, rtol=1e-4)
            model.unmerge_adapter()
            model.set_adapter("other")
            torch.testing.assert_close(logits(), pretrained, atol=1e-4, rtol=1e-4)
            model.set_adapter("default")
        model.save_pretrained(f"{folder}/all-{rank}-{kind.__name__}")
        state_dict = engine._zero3_consolidated_16bit_state_dict()  # as Trainer and Accelerate ask
        if rank == 0:
            model.save_pretrained(f"{folder}/one-0-{kind.__name__}", state_dict=state_dict)


def test_all_verbs_on_a_model_in_parts(tmp_path):
    """What is saved of it, in all processes or in one, is what a whole model loads."""
    rows, kinds, expected = batches()[0][:2], (tiny_gpt2, tiny_llama), {}
    for kind in kinds:
        model = adapted(kind)
        torch.manual_seed(5)
        with torch.no_grad():
            pretrained = model(input_ids=rows).logits
        moved(model, 0.05)
        layers = dict(rosa_layers(model))
        state = {
            n: [f.detach().clone() for f in x.adapters["default"].factors]
            for n, x in layers.items()
        }
        with torch.no_grad():
            expected[kind] = state, (model(input_ids=rows).logits, pretrained)
    in_processes(2, tmp_path, _verbs, str(tmp_path), expected)
    for kind in kinds:
        for way in ("all-0", "all-1", "one-0"):
            torch.manual_seed(0)
            base = kind().eval()
            model = PeftModel.from_pretrained(base, tmp_path / f"{way}-{kind.__name__}")
            with torch.no_grad():
                found = model(input_ids=rows).logits
            torch.testing.assert_close(found, expected[kind][1][0], atol=1e-4, rtol=1e-4)


def _begun_in_parts(rank, folder, expected):
    """As from_pretrained leaves a model where TrainingArguments(deepspeed=...) were made before."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    for (kind, options), (start, changes) in expected.items():
        torch.manual_seed(0)
        whole_one = kind().eval()
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": IN_PARTS}
        with deepspeed.zero.Init(config_dict_or_path=config):
            base = kind().eval()
        for one, other in zip(base.parameters(), whole_one.parameters(), strict=True):
            write(one, other.detach())
        torch.manual_seed(1)
        how = {"target_modules": "all-linear", **dict(options)}
        model = get_peft_model(base, RosaConfig(r=2, **how))
        for name, layer in rosa_layers(model):
            torch.testing.assert_close(layer.get_delta_weight("default"), start[name])
        engine, parts = in_parts(model, adam(model), IN_PARTS)
        for name, change in trained(model, parts, "clear", engine).items():
            assert (change - changes[name]).norm() < 1e-4 * changes[name].norm(), name
        model.save_pretrained(f"{folder}/{rank}")
        with deepspeed.zero.Init(config_dict_or_path=config):
            base = kind().eval()
        for one, other in zip(base.parameters(), whole_one.parameters(), strict=True):
            write(one, other.detach())
        again = PeftModel.from_pretrained(base, f"{folder}/{rank}")
        rows = batches()[0][:2]
        with torch.no_grad():
            expected_logits = engine(input_ids=rows).logits
            found = in_parts(again, None, IN_PARTS)[0](input_ids=rows).logits
        torch.testing.assert_close(found, expected_logits, atol=1e-4, rtol=1e-4)


def test_a_base_that_comes_in_parts_is_adapted_and_trained_as_a_whole_one(tmp_path):
    expected = {}
    for kind in (tiny_gpt2, tiny_llama):
        for options in ((), (("directions", "svd"),), (("trained", "B"),)):
            model = adapted(kind, **dict(options))
            start = {n: layer.get_delta_weight("default") for n, layer in rosa_layers(model)}
            expected[kind, options] = start, trained(model, adam(model), "clear")
    in_processes(2, tmp_path, _begun_in_parts, str(tmp_path), expected)


def _not_loaded(rank, folder):
    model = adapted()
    engine, optimizer = in_parts(model, adam(model), IN_PARTS)
    rows = batches()[0][:2]
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
    state_dict = copy.deepcopy(model.state_dict())
    of_adapter = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    model.save_pretrained(f"{folder}/{rank}")
    rosa.resample(engine, optimizer)
    for evaluated in (False, True):  # a pass without a backward one leaves the weights whole
        with torch.no_grad():
            before = engine(input_ids=rows).logits
        if not evaluated:
            engine.backward(0 * engine(input_ids=rows, labels=rows).loss)
            engine.step()
            with torch.no_grad():
                before = engine(input_ids=rows).logits
        for load in (
            lambda: model.load_state_dict(state_dict),
            lambda: set_peft_model_state_dict(model, dict(of_adapter)),
            lambda: model.load_adapter(f"{folder}/{rank}", "default", is_trainable=True),
            lambda: model.load_adapter(f"{folder}/{rank}", "another"),
            lambda: model.add_adapter("another", RosaConfig(r=2, target_modules="all-linear")),
            lambda: rosa.map_pretrained(model, folder),
            lambda: rosa.export_merged(model, f"{folder}/merged"),
            lambda: rosa.export_lora(model, f"{folder}/lora"),
        ):
            with pytest.raises(ValueError, match=r"in parts over processes \(ZeRO 3\)"):
                load()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
        with torch.no_grad():
            torch.testing.assert_close(engine(input_ids=rows).logits, before)


def test_what_would_miss_the_parts_is_refused(tmp_path):
    in_processes(2, tmp_path, _not_loaded, str(tmp_path))


def of_kind(kind, **options):
    """A model with adapted layers of a kind, the same in every process."""
    torch.manual_seed(0)
    base, targets = KINDS[kind]()
    base = base.float().eval()
    torch.manual_seed(1)
    return get_peft_model(base, RosaConfig(r=2, **targets, **options))


def come_in_parts(kind, **options):
    """The same, of a base that lies in parts when the adapter comes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 6, "zero_optimization": IN_PARTS}
    torch.manual_seed(0)
    whole_one, targets = KINDS[kind]()
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=config):
        base, _ = KINDS[kind]()
    base.eval()
    for one, other in zip(base.parameters(), whole_one.parameters(), strict=True):
        write(one, other.detach())
    torch.manual_seed(1)
    return get_peft_model(base, RosaConfig(r=2, **targets, **options))


def train_kind(model, optimizer, parts, engine=None):
    """The changes of the weights after some steps and two draws."""
    for step, x in enumerate(parts):
        if step == 1:
            rosa.watch(engine or model)
        loss = outputs(engine or model, x).float().square().mean()
        take_step(loss, optimizer, engine)
        if step in (2, 4):
            rosa.resample(engine or model, optimizer)
    return {n: layer.get_delta_weight("default") for n, layer in rosa_layers(model)}


def _every_kind(rank, folder, kind, options, begin):
    torch.manual_seed(7)
    rows = [inputs_of(kind, torch.float32) for _ in range(6)]
    one = of_kind(kind, **options)
    pretrained = copy.deepcopy(one).unload()
    expected = train_kind(one, adam(one), rows)
    model = begin(kind, **options)
    engine, optimizer = in_parts(model, adam(model), IN_PARTS)
    found = train_kind(model, optimizer, [x.chunk(2)[rank] for x in rows], engine)
    assert expected.keys() == found.keys()
    for name, change in found.items():
        assert all_equal(change), name
        assert (change - expected[name]).norm() < 1e-3 * expected[name].norm(), name

    def given(model):
        with torch.no_grad():
            return outputs(model, rows[0])

    near = {"atol": 1e-4, "rtol": 1e-3}
    for _ in range(2):
        torch.testing.assert_close(given(engine), given(one), **near)
        with model.disable_adapter():
            torch.testing.assert_close(given(engine), given(pretrained), **near)
        model.merge_adapter()
        torch.testing.assert_close(given(engine), given(one), **near)
        model.unmerge_adapter()
    model.save_pretrained(f"{folder}/{rank}")
    loaded = PeftModel.from_pretrained(pretrained, f"{folder}/{rank}")
    torch.testing.assert_close(given(loaded), given(one), **near)


@pytest.mark.parametrize("begin", [of_kind, come_in_parts])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"directions": "svd"}),
        ("gpt2", {"trained": "B"}),
        ("pictures", {}),
        ("pictures", {"trained": "A", "directions": "orthonormal"}),
        ("experts", {}),
    ],
    ids=str,
)
def test_layers_of_every_kind_are_trained_in_parts(kind, options, begin, tmp_path):
    in_processes(2, tmp_path, _every_kind, str(tmp_path), kind, options, begin)


def _with_dropout(rank, kind):
    """Each process draws its own; nothing but the sum of the factors' gradients is to be alike."""
    model = of_kind(kind, rosa_dropout=0.5).train()
    engine, optimizer = in_parts(model, adam(model), IN_PARTS)
    rows = [inputs_of(kind, torch.float32)[rank::2] for _ in range(4)]
    assert all(map(all_equal, train_kind(model, optimizer, rows, engine).values()))


def test_dropout_in_parts(tmp_path):
    in_processes(2, tmp_path, _with_dropout, "bert")


def _quantized(rank):
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False).to("cpu"))
    model = get_peft_model(base, RosaConfig(r=2, target_modules=["0"]))
    engine, optimizer = in_parts(model, adam(model), IN_PARTS)
    refused = pytest.raises(ValueError, match="which ROSA does not adapt in ZeRO 3: leave it")
    with refused:
        engine(torch.randn(2, 8))
    with refused:
        rosa.resample(engine, optimizer)


def test_codes_in_parts_are_refused(tmp_path):
    in_processes(2, tmp_path, _quantized)


def _steps(engine, optimizer, steps):
    rank = distributed.get_rank()
    for step in steps:
        rows = batches()[step % 8][2 * rank : 2 * rank + 2]
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
        if step % 3 == 2:
            rosa.resample(engine, optimizer)


def _goes_on(rank, folder):
    rows = batches()[0][:2]

    def logits(engine):
        with torch.no_grad():
            return engine(input_ids=rows).logits

    for case, (options, precision) in enumerate(
        (
            ({}, {}),
            ({"trained": "B"}, {}),
            ({"directions": "svd"}, {}),
            ({}, {"bf16": {"enabled": True}}),
        )
    ):
        model = adapted(**options)
        engine, optimizer = in_parts(model, adam(model), IN_PARTS, **precision)
        with model.disable_adapter():
            pretrained = logits(engine)
        norms = [layer.base_weight.norm for _, layer in rosa_layers(model)]
        _steps(engine, optimizer, range(5))
        saved = logits(engine)
        for frozen in (True, False):
            tag = f"case-{case}-{frozen}"
            engine.save_checkpoint(folder, tag, exclude_frozen_parameters=not frozen)
        _steps(engine, optimizer, range(5, 9))
        expected = logits(engine)
        tolerance = {"atol": 5e-2, "rtol": 5e-2} if precision else {"atol": 1e-4, "rtol": 1e-4}
        for fresh in (False, True):
            for frozen in (True, False):
                if fresh:
                    # Of half precision the same draws, for W_0 is exact to their rounding.
                    model = adapted(**options, seed=0 if precision else 5)
                    engine, optimizer = in_parts(model, adam(model), IN_PARTS, **precision)
                tag = f"case-{case}-{frozen}"
                engine.load_checkpoint(folder, tag, load_module_strict=False)
                torch.testing.assert_close(logits(engine), saved, **tolerance)
                with model.disable_adapter():
                    torch.testing.assert_close(logits(engine), pretrained, **tolerance)
                torch.testing.assert_close(logits(engine), saved, **tolerance)
                now = [layer.base_weight.norm for _, layer in rosa_layers(model)]
                assert now == pytest.approx(norms, rel=1e-5), (case, fresh, frozen)
                for _, layer in rosa_layers(model):
                    if fresh:
                        layer.adapters["default"].config.seed = 0
                _steps(engine, optimizer, range(5, 9))
                if not precision:
                    torch.testing.assert_close(logits(engine), expected, **tolerance)


def test_a_training_goes_on_from_deepspeeds_checkpoints(tmp_path):
    in_processes(2, tmp_path, _goes_on, str(tmp_path))


def _within_a_pass(rank):
    model = adapted()
    engine, _ = in_parts(model, adam(model), IN_PARTS)
    (_, layer), *_ = rosa_layers(model)
    layer.base_layer.register_forward_pre_hook(lambda *_: model.merge_adapter())
    with pytest.raises(ValueError, match="in use by a forward or backward pass"):
        engine(input_ids=batches()[0][:2])


def test_a_weight_that_is_whole_for_a_pass_is_not_written_to(tmp_path):
    in_processes(2, tmp_path, _within_a_pass)


def _held_otherwise(rank):
    model = adapted()
    engine, optimizer = in_parts(model, adam(model), IN_PARTS)
    (_, layer), *_ = rosa_layers(model)
    layer.base_weight.parameter.ds_tensor.ds_quant_scale = torch.ones(1)  # as on an accelerator
    with pytest.raises(ValueError, match="leave zero_quantized_nontrainable_weights out"):
        rosa.resample(engine, optimizer)
    model = adapted()
    engine, optimizer = in_parts(model, adam(model), {**IN_PARTS, "zero_hpz_partition_size": 2})
    with pytest.raises(ValueError, match="leave zero_hpz_partition_size out"):
        rosa.resample(engine, optimizer)


def test_parts_that_are_held_in_another_way_are_refused(tmp_path):
    in_processes(2, tmp_path, _held_otherwise)


ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def _by_trainer(rank, folder, deepspeed, trained, steps, resume=None):
    os.environ["DS_ACCELERATOR"] = "cpu"
    model, callback = adapted(trained=trained), RosaCallback(every=5)
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
    every = (2, 7, 12) if trained == "both" else (5, 10, 15)  # B alone looks for no gradient first
    assert callback.drawn_at == [step for step in every if step < steps]
    changes = {n: layer.get_delta_weight("default") for n, layer in rosa_layers(model)}
    if rank == 0:
        torch.save(changes, f"{folder}/{'zero' if deepspeed else 'plain'}-{steps}.pt")
    sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()


@pytest.mark.parametrize(
    ("zero", "trained"),
    [(zero, t) for zero in ({"stage": 2}, IN_PARTS) for t in ("both", "B")],
    ids=str,
)
def test_trainer_trains_in_parts_what_it_trains_without_and_resumes(zero, trained, tmp_path):
    config = {**ZERO, "zero_optimization": zero}
    for part, (deepspeed, steps, resume) in enumerate(
        [(None, 16, None), (config, 9, None), (config, 16, True)]
    ):
        (tmp_path / str(part)).mkdir()
        in_processes(
            2, tmp_path / str(part), _by_trainer, str(tmp_path), deepspeed, trained, steps, resume
        )
    plain, zero = (torch.load(tmp_path / f"{kind}-16.pt") for kind in ("plain", "zero"))
    for name, change in plain.items():
        assert (change - zero[name]).norm() < 1e-4 * change.norm(), name
