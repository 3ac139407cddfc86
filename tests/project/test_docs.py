"""What README and docs tell people to run, run as it stands; and what they say of settings."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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
from rosa.bench.setup.settings import RunSettings
from rosa.cli.commands import app
from tests.chats import chat_model, write_chats
from tests.helpers import moved, run, write_csv
from tests.models import WORDS, save_with_tokenizer

ROOT = Path(__file__).parents[2]
README, INFORMED = ROOT / "README.md", ROOT / "docs" / "informed.md"
GUIDES = [ROOT / "docs" / "first.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]


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


def tiny_decoder() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=WORDS.index("[CLS]"),
        eos_token_id=WORDS.index("[SEP]"),
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with what the README's lines name: models and tables."""
    save_with_tokenizer(tiny_roberta(), tmp_path / "roberta-base")
    save_with_tokenizer(tiny_decoder(), tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    chat_model(tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct")
    write_chats(tmp_path / "chats.jsonl")
    preferences = {"prompt": "the film was", "chosen": " very good", "rejected": " a film"}
    (tmp_path / "preferences.jsonl").write_text(f"{json.dumps(preferences)}\n" * 40)
    monkeypatch.setattr("builtins.input", lambda _: "")  # a chat that is over
    for name in ("reviews.csv", "more.csv"):
        write_csv(tmp_path / name, labels=("0", "1"))
    pair = json.dumps({"prompt": "film :", "completion": " the film was fine"})
    (tmp_path / "pairs.jsonl").write_text(f"{pair}\n" * 40)
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


@pytest.mark.usefixtures("place")
def test_the_examples_on_layers_run_as_they_stand():
    found: dict[str, Any] = {"rosa": rosa}
    for block in blocks(ROOT / "docs" / "layers.md", "python"):
        exec(block, found)
    kinds = {type(layer).__name__ for layer in found["model"].modules()}
    assert "RosaQuantizedLinear" in kinds
    ids = torch.randint(4, len(WORDS), (2, 6))
    found["model"](input_ids=ids, labels=ids).loss.backward()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_guides_run_as_they_stand(page):
    found: dict[str, Any] = {}
    if "chats.jsonl" in page.read_text("utf-8"):
        pytest.importorskip("trl")
    for language, block in re.findall(
        r"^```(\w+)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S
    ):
        if language == "python":
            exec(block, found)
        for words in commands(block) if language == "sh" else ():
            if words[0] != "compare":  # many runs, each in a process of its own
                run(*words)


def test_the_site_is_built_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "reference" / "commands.html").read_text("utf-8")
    for text in ("rosa generate", "--gradient-accumulation", "rotations of the inputs in blocks"):
        assert text in commands


WITHOUT_ROSA = """
import sys
sys.modules["rosa"] = None  # an import of it fails
import torch
from peft import PeftModel
from transformers import {kind}, pipeline

base = {kind}.from_pretrained("base")
loaded = {kind}.from_pretrained("base")
loaded.load_adapter("lora")
models = {{
    "PEFT": PeftModel.from_pretrained(base, "lora"),
    "load_adapter": loaded,
    "pipeline": pipeline("{task}", model="lora", tokenizer="base").model,
    "merged": pipeline("{task}", model="merged", tokenizer="base").model,
}}
ids, wanted = torch.load("wanted.pt")
for name, model in models.items():
    with torch.no_grad():
        found = model.eval()(input_ids=ids.to(model.device)).logits.cpu()
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), name
"""


@pytest.mark.parametrize(
    ("make", "kind", "task"),
    [
        (tiny_roberta, "AutoModelForSequenceClassification", "text-classification"),
        (tiny_decoder, "AutoModelForCausalLM", "text-generation"),
    ],
)
def test_exports_are_served_where_rosa_cannot_be_imported(make, kind, task, tmp_path):
    save_with_tokenizer(make(), tmp_path / "base")
    base = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    tasks = {"text-classification": "SEQ_CLS", "text-generation": "CAUSAL_LM"}
    config = rosa.RosaConfig(
        r=2, target_modules="all-linear", task_type=tasks[task], directions="orthonormal"
    )
    model = get_peft_model(base, config).eval()
    for _ in range(2):
        moved(model, 0.05)
        rosa.resample(model)
    moved(model, 0.05)
    ids = torch.randint(4, len(WORDS), (2, 6))
    with torch.no_grad():
        torch.save((ids, model(input_ids=ids).logits), tmp_path / "wanted.pt")
    rosa.export_lora(model, tmp_path / "lora")
    rosa.export_merged(model, tmp_path / "merged")
    script = WITHOUT_ROSA.format(kind=kind, task=task)
    command = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=250)


def messages(folder: Path) -> Iterator[str]:
    """All texts in the source, with … where a value is put in."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())
            elif isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                yield " ".join("".join(parts).split())


def test_errors_that_the_docs_quote_are_in_the_source():
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    quoted = [
        " ".join(quote.split()) for quote in re.findall(r'^\*\*"(.*?)"\*\*', page, re.M | re.S)
    ]
    assert len(quoted) > 30
    known = list(messages(ROOT / "src"))
    for quote in quoted:
        assert any(quote in message for message in known), quote


def test_every_page_is_in_the_sites_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r": ([\w/-]+\.md)$", navigation, re.M))
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs)) for path in (*docs.glob("*.md"), *docs.glob("*/*.md"))}
    assert named == pages


@pytest.mark.parametrize(
    "words",
    [
        w
        for page in (README, *ROOT.glob("docs/*.md"), *GUIDES)
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
