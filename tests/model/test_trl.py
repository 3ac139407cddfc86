"""TRL's trainers with ROSA and its callback: real steps, draws, and the right reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rosa
from tests.chats import chat, chat_model, words

pytest.importorskip("trl")
CONFIG = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SMALL = {
    "max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
    "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
    "use_cpu": True,
}  # fmt: skip


@pytest.fixture
def base(tmp_path) -> Path:
    return chat_model(tmp_path / "base")


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def logits(model: Any) -> Tensor:
    """Of some words, by a model in whatever mode it is."""
    ids = torch.arange(4, 14).view(1, -1)
    training = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(training)
    return found


def assert_trained(model: Any, base: Path, folder: Path, draws: rosa.RosaCallback) -> None:
    """It was drawn anew, has learned, is saved whole, and disabled it is the pretrained model."""
    assert len(draws.drawn_at) >= 2
    pretrained = logits(load(base))
    assert (logits(model) - pretrained).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), pretrained, rtol=1e-4, atol=1e-5)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(load(base), folder)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("directions", ["gradient", "svd"])
def test_sft(base, tmp_path, directions):
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    draws = rosa.RosaCallback(every=2)
    model = get_peft_model(load(base), rosa.RosaConfig(**CONFIG, directions=directions))
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path / "out"), assistant_only_loss=True, **SMALL),
        train_dataset=Dataset.from_list([chat() for _ in range(20)]),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[draws],
    )
    trainer.train()
    assert_trained(model, base, tmp_path / "adapter", draws)


def pairs(rows: int) -> Dataset:
    texts = [{"prompt": words(3), "chosen": f" {words(4)}", "rejected": f" {words(4)}"}
             for _ in range(rows)]  # fmt: skip
    return Dataset.from_list(texts)


def pretrained_log_probs(base: Path, batch: dict[str, Tensor]) -> Tensor:
    """Of each completion in a batch, by the model as it was pretrained."""
    with torch.no_grad():
        found = load(base).eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = found[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("given", ["a config", "a model"])
def test_dpo_holds_against_the_pretrained_model_after_draws_too(base, tmp_path, given):
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    draws, config, model = rosa.RosaCallback(every=2), rosa.RosaConfig(**CONFIG), load(base)
    if given == "a model":  # then TRL adds an adapter "ref" beside the one that it trains
        model, config = get_peft_model(model, config), None
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path / "out"), **SMALL),
        train_dataset=pairs(20),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
        callbacks=[draws],
    )

    def assert_reference_is_pretrained() -> None:
        batch = next(iter(trainer.get_train_dataloader()))
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, dict(batch))
        expected = pretrained_log_probs(base, batch)
        found = torch.cat([torch.as_tensor(chosen), torch.as_tensor(rejected)]).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    assert_reference_is_pretrained()
    trainer.train()
    assert_reference_is_pretrained()
    assert trainer.model is not None
    assert trainer.state.log_history
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    assert_trained(trainer.model, base, tmp_path / "adapter", draws)


def test_grpo(base, tmp_path):
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    def longer_is_better(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    draws = rosa.RosaCallback(every=2)
    trainer = GRPOTrainer(
        load(base),
        longer_is_better,
        args=GRPOConfig(
            str(tmp_path / "out"), num_generations=4, max_completion_length=6, beta=0.1, **SMALL
        ),
        train_dataset=Dataset.from_list([{"prompt": words(3)} for _ in range(20)]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=rosa.RosaConfig(**CONFIG),
        callbacks=[draws],
    )
    trainer.train()
    assert_trained(trainer.model, base, tmp_path / "adapter", draws)
