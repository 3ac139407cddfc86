"""Every row of the table of methods: it trains, it is loaded as it was saved, and its size."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
)

from rosa import cli
from rosa.bench.setup import methods
from rosa.bench.setup.checking import check
from rosa.bench.setup.methods import METHODS
from rosa.bench.setup.settings import RunSettings
from rosa.bench.train import training
from rosa.bench.train.building import Base, adapt
from rosa.errors import UserError
from rosa.layers.in_model import rosa_layers
from tests.models import WORDS, needs_packages, save_with_tokenizer, tiny_gpt2

ADAPTERS = [name for name, method in METHODS.items() if method.config is not None]
OPTIMIZERS = [name for name, method in METHODS.items() if method.optim is not None]


def sized(hidden: int, intermediate: int, groups: int = 4) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=groups,
            max_position_embeddings=64,
            initializer_range=0.3,
            pad_token_id=0,
        )
    )


def llama() -> LlamaForCausalLM:
    return sized(16, 24, groups=2)


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
        )
    )


def settings_of(method: str, rank: int = 2, **others: object) -> RunSettings:
    settings = RunSettings(model="m", output=Path("o"), method=method, **others)  # type: ignore[arg-type]
    return check(replace(settings, rank=rank if METHODS[method].has_rank else None))


def batch(decoder: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 50, (4, 10))
    labels = ids if decoder else torch.tensor([0, 1, 0, 1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def attached(method: str, base: PreTrainedModel, targets: str, rank: int = 2) -> PeftModel:
    decoder = isinstance(base, LlamaForCausalLM)
    # The pooler of an encoder is trained in full, as where the checkpoint lacks it; there a method
    # of trained tokens is refused.
    lacks_pooler = not decoder and not METHODS[method].virtual_tokens
    fresh = ["bert.pooler"] if lacks_pooler else []
    settings = settings_of(method, rank, target_modules=(targets,))
    whole = Base(base, fresh, "CAUSAL_LM" if decoder else "SEQ_CLS")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`|Specified to not save")
        return adapt(settings, whole, lambda: [batch(decoder)])[0]


@pytest.mark.parametrize(("targets", "autocast"), [("attention", False), ("all-linear", True)])
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("method", ADAPTERS)
def test_it_trains_and_is_loaded_as_it_was_saved(method, make, targets, autocast, tmp_path):
    base = make()
    pretrained = {n: t.clone() for n, t in base.state_dict().items()}
    decoder = make is llama
    if autocast and method != "lora_ga":  # as a run loads what it does not train
        base.to(torch.bfloat16)
    dtype = base.dtype
    model = attached(method, base, targets)
    if method == "adalora":  # its schedule is in training.py
        model.base_model.rankallocator.peft_config.total_step = 100
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=METHODS[method].lr)
    seen, losses = batch(decoder), []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**seen).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    if not autocast:  # the first steps' gain may be less than bfloat16 tells
        assert min(losses[1:]) < losses[0]
    assert any(not torch.equal(p, b) for p, b in zip(trained, before, strict=True))

    if method == "lora_ga":
        return  # PEFT saves no more than the factors, and their start was taken out of the weights
    model.eval()
    model.save_pretrained(tmp_path)
    fresh = make()
    fresh.load_state_dict(pretrained)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save")
        again = PeftModel.from_pretrained(fresh.to(dtype), tmp_path).eval()
    seen = {name: values for name, values in seen.items() if name != "labels"}
    with torch.no_grad():
        found, expected = again(**seen).logits, model(**seen).logits
    # PiSSA and its like find the start of the factors again, and take it out, up to rounding.
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.3 if rough else 1e-4)


LIKE_LORA = {
    "hira": (1, 1),
    "shira": (1, 1),
    "lokr": (0.9, 1.1),
    "miss": (0.9, 1.1),
    "randlora": (0.9, 1.2),
    "oft": (0.65, 1.1),  # its blocks must divide the inputs
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("groups", [4, 1])
def test_the_number_of_parameters_is_near_to_loras(rank, groups):
    lora = count(attached("lora", sized(128, 344, groups), "all-linear", rank))
    for method, (least, most) in LIKE_LORA.items():
        model = attached(method, sized(128, 344, groups), "all-linear", rank)
        assert least <= count(model) / lora <= most, method


def test_alpha_over_rank_is_the_scale():
    for method, scale in (("randlora", 20), ("lokr", 1), ("lora", 2)):
        for alpha in (None, 6.0):
            config = METHODS[method].config(  # type: ignore[misc]
                settings_of(method, 4, alpha=alpha), 4, {}, [(16, 24), (16, 16)]
            )
            whole = getattr(config, "randlora_alpha", None) or getattr(config, "alpha", None)
            whole = whole or config.lora_alpha  # type: ignore[attr-defined]
            assert whole / config.r == (scale if alpha is None else 1.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["randlora", "shira"])
def test_the_seed_is_the_runs(method):
    found = [
        METHODS[method].config(settings_of(method, seed=seed), 2, {}, [(16, 16)])  # type: ignore[misc]
        for seed in (3, 4)
    ]
    name = {"randlora": "projection_prng_key", "shira": "random_seed"}[method]
    assert [getattr(config, name) for config in found] == [3, 4]


@pytest.mark.parametrize("method", ["lokr", "miss", "oft", "shira", *OPTIMIZERS])
def test_layers_that_a_method_cannot_take_are_a_users_error(method, monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"cannot be put into GPT2|names none of GPT2"):
        adapt(settings_of(method), Base(tiny_gpt2(), [], "CAUSAL_LM"), list)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_missing_packages_are_said_before_anything_trains(method, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    where = ["--model", str(tmp_path), "--train", str(tmp_path), "--output", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["rosa", "compare", "--methods", f"lora,{method}", *where])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{method}_torch" in message
    assert "pip install 'rosa-finetune[optimizers]'" in message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("given", ["directions=svd", "resample_every=3", "moments=keep"])
def test_what_only_rosa_has_is_refused_of_others(given):
    assert settings_of("rosa", set=(given,)) != settings_of("rosa")
    with pytest.raises(UserError, match="means nothing to method dora"):
        settings_of("dora", set=(given,))


def test_settings_that_contradict_each_other_or_mean_nothing_are_refused():
    assert settings_of("rosa", set=("trained=B",)) == settings_of("rosa", trained="B")
    assert settings_of("rosa", trained="B", set=("trained=B",)).trained == "B"
    with pytest.raises(UserError, match="--set trained=A and trained B contradict each other"):
        settings_of("rosa", trained="B", set=("trained=A",))
    for method in ("full", "head", "targets"):
        with pytest.raises(UserError, match=f"{method} has no alpha"):
            settings_of(method, alpha=4.0)


@pytest.mark.parametrize("given", ["trained=B", "directions=svd", "first_draw=3"])
def test_relora_has_rosas_schedule_and_nothing_else_of_it(given):
    assert settings_of("relora", set=("resample_every=3",)).resample_every == "3"
    with pytest.raises(UserError, match="means nothing to method relora"):
        settings_of("relora", set=(given,))


def test_an_optimizer_without_weight_decay_says_so(monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: name)
    for method in OPTIMIZERS:
        with pytest.raises(UserError, match="no weight decay"):
            settings_of(method, weight_decay=0.1)


@pytest.mark.parametrize(
    ("make", "targets"),
    [(bert, "attention"), (bert, "all-linear"), (llama, "all-linear"), (tiny_gpt2, "c_attn")],
)
def test_targets_trains_what_an_adapter_changes(make, targets):
    """No more than the weights that ROSA adapts, and the head that it trains beside them."""
    base = make()
    kind = "SEQ_CLS" if hasattr(base, "classifier") else "CAUSAL_LM"

    def adapted(method: str) -> nn.Module:
        settings = settings_of(method, target_modules=(targets,))
        return adapt(settings, Base(copy.deepcopy(base), [], kind), lambda: [])[0]

    layers = rosa_layers(adapted("rosa"))
    names = {name.removeprefix("base_model.model.") + ".weight" for name, _ in layers}
    model = adapted("targets")
    trained = {name for name, values in model.named_parameters() if values.requires_grad}
    assert names
    assert trained == names | {name for name in base.state_dict() if name.startswith("classifier")}
    with pytest.raises(UserError, match="names none"):
        adapt(settings_of("targets", target_modules=("other",)), Base(base, [], kind), lambda: [])


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_moments_are_of_the_rank_and_training_resumes(method, tmp_path, monkeypatch):
    needs_packages(method)
    base = save_with_tokenizer(llama(), tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS[4 + i % 5 : 10]) for i in range(40)) + "\n")
    settings = RunSettings(
        model=str(base), output=tmp_path / "whole", method=method, rank=2, train=text, lr=0.01,
        validation=text, epochs=3, batch_size=8, max_length=16, target_modules=("all-linear",),
    )  # fmt: skip
    build, trainers = training.build_trainer, []

    def keeping(*arguments):
        built = build(*arguments)
        trainers.append(built[0])
        return built

    monkeypatch.setattr(training, "build_trainer", keeping)
    whole = training.train(settings)
    states = trainers[0].optimizer.state
    for name, weight in trainers[0].model.named_parameters():
        moments = states[weight]["exp_avg"].shape
        if "_proj" in name:
            assert sorted(moments) == sorted((2, max(weight.shape))), name
        else:  # embeddings, norms and the head
            assert moments == weight.shape, name

    save = Trainer._save_checkpoint

    def save_and_stop(self, *arguments, **others):
        save(self, *arguments, **others)
        raise KeyboardInterrupt

    settings = replace(settings, output=tmp_path / "parts")
    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(settings)
    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    parts = training.train(settings, resume=True)
    for name in ("steps", "train_loss", "eval_loss"):
        assert parts.to_json()[name] == pytest.approx(whole.to_json()[name], rel=1e-4)
