"""What README and docs tell people to run, run as it stands; and what they say of settings."""

from __future__ import annotations

import re
import shlex
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from typer.main import get_command

import rosa
from rosa.bench.settings import RunSettings
from rosa.cli.commands import app
from tests.helpers import run, write_csv
from tests.models import WORDS, save_with_tokenizer

ROOT = Path(__file__).parents[1]
README, INFORMED = ROOT / "README.md", ROOT / "docs" / "informed.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The lines of a block that call `rosa`, as lists of words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("rosa ")]


def tiny_roberta() -> PreTrainedModel:
    config = RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=140,
        pad_token_id=WORDS.index("[PAD]"),
    )
    return RobertaForSequenceClassification(config)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with what the README's lines name: a model and two tables."""
    save_with_tokenizer(tiny_roberta(), tmp_path / "roberta-base")
    for name in ("reviews.csv", "more.csv"):
        write_csv(tmp_path / name, labels=("0", "1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_example_runs_as_it_stands(place):
    (block,) = blocks(README, "python")
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["callbacks"][0].drawn_at
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    loaded, plain = found["loaded"].eval(), found["plain"].eval()
    assert isinstance(plain, RobertaForSequenceClassification)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, plain(**ids).logits, rtol=1e-4, atol=1e-5)
    assert (place / "lora" / "adapter_config.json").is_file()


def test_the_readmes_commands_run_as_they_stand(place):
    (block,) = (text for text in blocks(README, "sh") if "rosa evaluate" in text)
    for words in commands(block):
        run(*words)
    assert (place / "reviews-model" / "model.safetensors").is_file()


def test_the_loops_of_the_docs_run_as_they_stand(tmp_path):
    (block,) = blocks(INFORMED, "python")
    ids, labels = torch.randint(4, len(WORDS), (4, 2, 6)), torch.randint(2, (4, 2))
    batches = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    args = TrainingArguments(str(tmp_path), report_to="none")
    found: dict[str, Any] = {
        "rosa": rosa,
        "torch": torch,
        "get_peft_model": get_peft_model,
        "Trainer": Trainer,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no gradient was seen")
        found |= {"base": tiny_roberta(), "args": args, "four_batches": batches, "data": []}
        exec(block, found)


def test_the_examples_on_layers_run_as_they_stand(tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    save_with_tokenizer(LlamaForCausalLM(config), tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"rosa": rosa}
    for block in blocks(ROOT / "docs" / "layers.md", "python"):
        exec(block, found)
    kinds = {type(layer).__name__ for layer in found["model"].modules()}
    assert "RosaQuantizedLinear" in kinds
    ids = torch.randint(4, len(WORDS), (2, 6))
    found["model"](input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    "words",
    [
        w
        for page in (README, *ROOT.glob("docs/*.md"))
        for b in blocks(page, "sh")
        for w in commands(b)
    ],
    ids=" ".join,
)
def test_commands_of_the_docs_have_options_that_there_are(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], words[1:])


@pytest.mark.parametrize(
    "page", [README, ROOT / "docs" / "settings.md"], ids=lambda page: page.stem
)
def test_settings_that_the_docs_name_are_there_with_these_defaults(page):
    known = {f.name: f.default for f in (*fields(RunSettings), *fields(rosa.RosaConfig))}
    known |= {"every": "auto", "first": None}
    text = page.read_text("utf-8").split("## What was tried and dropped")[0]
    rows: list[tuple[str, str]] = re.findall(r"^\| `([a-z]\w*)`[^|]*\| ([^|]*) \|", text, re.M)
    assert len(rows) >= 4
    for name, said in rows:
        assert name in known, f"{page.name} names the setting {name}, which there is not"
        default = known[name]
        if isinstance(default, str):
            assert said.startswith(f'`"{default}"`'), (name, said)
        elif default is not None:
            assert said.startswith(f"{default:g}"), (name, said)
