"""A plan says what a real step takes."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from rosa.bench.planning import kept_bytes, parse_memory, plan
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.bench.train.building import Base, adapt
from rosa.errors import UserError
from rosa.resampling.schedule import auto_period
from tests.helpers import fails, run

SHAPES: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ),
    "gpt2": GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    ),
    "roberta": RobertaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        architectures=["RobertaForMaskedLM"],
    ),
}


@pytest.fixture(params=SHAPES)
def folder(request, tmp_path) -> Path:
    SHAPES[request.param].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


HOW: list[dict[str, Any]] = [
    {},
    {"trained": "B", "target_modules": ("all-linear",)},
    {"precision": "bf16", "target_modules": ("all-linear",)},
    {"gradient_checkpointing": True},
    {"method": "lora"},
    {"method": "full", "rank": None},
    {"method": "targets", "rank": None, "target_modules": ("all-linear",)},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_it_counts_what_a_real_step_keeps_and_trains(folder, how):
    given = {"precision": "fp32", "rank": 4, "batch_size": 3, "max_length": 20, **how}
    settings = RunSettings(model=str(folder), output=folder / "run", **given)
    found = plan(settings, steps=1000, tflops=1)

    config = AutoConfig.from_pretrained(folder)
    decoder = config.architectures != ["RobertaForMaskedLM"]
    auto: Any = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    half = settings.precision == "bf16"
    base = auto.from_config(config, dtype=torch.bfloat16 if half else torch.float32).train()
    base.config.pad_token_id = 0
    weights = sum(p.nbytes for p in base.parameters())
    model, _ = adapt(settings, Base(base, [], "CAUSAL_LM" if decoder else "SEQ_CLS"), list)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(2, 300, (3, 20))
    labels = ids if decoder else torch.zeros(3, dtype=torch.long)
    with (
        FlopCounterMode(display=False) as counter,
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        kept, loss = kept_bytes(model, lambda: model(input_ids=ids, labels=labels).loss)
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.trained == sum(p.numel() for p in trained)
    assert found.device["gradients"] == sum(p.grad.nbytes for p in trained)  # type: ignore[union-attr]
    assert (
        found.device["weights" if find_method(settings.method).in_full else "frozen weights"]
        == weights
    )
    assert found.device["kept for the backward pass"] == pytest.approx(kept, rel=0.02)
    assert found.operations == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert found.step_seconds == pytest.approx(found.operations / 1e12)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("keeps_its_output", [torch.exp, torch.tanh, lambda x: x.softmax(-1)])
def test_what_was_counted_is_given_back(keeps_its_output, backward):
    layer, alive = torch.nn.Linear(4, 4), []

    def compute() -> torch.Tensor:
        out = keeps_its_output(layer(torch.randn(2, 4)))
        alive.append(weakref.ref(out))
        return out.square().sum()

    kept, loss = kept_bytes(layer, compute)
    assert kept == 2 * 2 * 4 * 4  # the layer's input, and the output
    if backward:
        loss.backward()
        assert layer.weight.grad.abs().sum() > 0
    del loss
    gc.collect()
    assert alive[0]() is None


def test_draws_make_an_offset_of_full_rank_at_most_and_processes_make_buckets(folder):
    given = {"rank": 4, "max_length": 20, "resample_every": "10", "precision": "fp32"}
    settings = RunSettings(model=str(folder), output=folder / "run", **given)
    few, many, later = (plan(settings, n, tflops=1) for n in (10, 30, 10_000))
    # As the callback has it: by the gradient there is one more, at half of the first ten steps.
    assert (few.draws, many.draws, later.draws) == (2, 4, 1001)
    even = plan(replace(settings, directions="orthonormal"), 30, tflops=1)
    assert even.draws == 3
    sizes = [next(iter(p.main.values())) for p in (few, many, later)]
    assert sizes[0] < sizes[1] <= sizes[2] < 2 * few.device["frozen weights"]
    two = plan(settings, 10, gpus=2, tflops=1)
    assert two.device["gradients"] == 2 * few.device["gradients"]
    assert two.tokens == 2 * few.tokens


def test_what_an_optimizer_freezes_is_not_trained(folder):
    given = {"rank": 4, "max_length": 20, "precision": "fp32", "target_modules": ("all-linear",)}
    settings = RunSettings(model=str(folder), output=folder / "run", **given)
    lora, fa = (plan(replace(settings, method=m), 10, tflops=1) for m in ("lora", "lora_fa"))
    b_alone = plan(replace(settings, trained="B"), 10, tflops=1)
    assert fa.trained == b_alone.trained < lora.trained
    assert fa.device["kept for the backward pass"] < lora.device["kept for the backward pass"]


def test_auto_counts_what_the_training_counts(folder):
    given = {"rank": 4, "max_length": 20, "precision": "fp32", "target_modules": ("all-linear",)}
    settings = RunSettings(model=str(folder), output=folder / "run", **given)
    found = plan(settings, 10_000, tflops=1)
    classifier = "roberta" in (folder / "config.json").read_text()
    items = settings.batch_size if classifier else found.tokens
    head = replace(settings, method="head", rank=None)
    period = auto_period(
        found.trained - (plan(head, 1, tflops=1).trained if classifier else 0), items
    )
    assert found.draws == 1 + len(range(32, 10_000, period))


def test_weights_in_parts_are_counted_in_parts(folder):
    given = {"rank": 4, "max_length": 20, "precision": "fp32", "target_modules": ("all-linear",)}
    settings = RunSettings(model=str(folder), output=folder / "run", **given)
    alone, spread = plan(settings, 10, tflops=1), plan(settings, 10, 4, tflops=1, sharded=True)
    shared = ("frozen weights", "trained factors and heads", "gradients", "Adam's moments")
    for name in shared:
        assert spread.device[name] == -(-alone.device[name] // 4)
    whole = spread.device["weights that are whole at a time"]
    assert 0 < whole <= alone.device["frozen weights"]
    assert spread.device["kept for the backward pass"] == alone.device["kept for the backward pass"]
    assert spread.main == alone.main
    with pytest.raises(UserError, match="--sharded is for weights in full"):
        plan(replace(settings, load_in="4bit"), 10, 4, tflops=1, sharded=True)


def test_frozen_weights_of_fewer_bits_and_their_offset_lie_on_the_device(folder):
    given = {"rank": 4, "max_length": 20, "load_in": "4bit", "target_modules": ("all-linear",)}
    if "gpt2" in (folder / "config.json").read_text():
        pytest.skip("its layers are no torch.nn.Linear")
    settings = RunSettings(model=str(folder), output=folder / "run", **given)
    whole = plan(replace(settings, load_in="full"), 100, tflops=1)
    found = plan(settings, 100, tflops=1)
    assert found.device["frozen weights"] < whole.device["frozen weights"]
    assert whole.main
    assert not found.main
    assert any("offset" in name for name in found.device)


def test_the_command_prints_it_from_a_config_alone(folder, capsys):
    how = ["--model", folder, "--rank", 4, "--max-length", 20, "--memory", "1GB"]
    run("plan", *how)
    told = " ".join(capsys.readouterr().out.split())
    assert "fits into 90% of 1.00 GiB" in told
    assert "tokens a second" in told
    run("plan", *how[:-1], "0.001GB", "--tflops", 1)
    assert "does NOT fit" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "much"], "is a size such as 80GB"),
        (["--memory", "0GB"], "is a size such as 80GB"),
        (["--gpus", 0], "--gpus must be positive"),
        (["--tflops", -1], "--tflops must be positive"),
        (["--method", "pissa"], "there is a plan for"),
        (["--resample-every", "epoch"], "knows no epochs"),
        (["--model", "nowhere/at all"], "neither a folder nor a hub id"),
    ],
)
def test_bad_input(folder, capsys, arguments, message):
    given = {"--model": folder, "--max-length": 20, "--tflops": 1}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    told = fails(capsys, "plan", *(word for pair in given.items() for word in pair))
    assert message in told


def test_sizes():
    assert parse_memory("80GB") == parse_memory("80 gib") == 80 * 2**30
    assert parse_memory("1.5T") == 1536 * 2**30
    with pytest.raises(UserError, match="such as 80GB"):
        parse_memory("80MB")
