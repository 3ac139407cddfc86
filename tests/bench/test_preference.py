"""`rosa train --preference`: DPO, held against the pretrained model, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosa.bench.tasks.preference import read_preferences
from tests.chats import chat_model, words
from tests.helpers import fails, run
from tests.models import save_with_tokenizer, tiny_bert, tiny_llama

pytest.importorskip("trl")
QUICK = ["--preference", "--steps", 12, "--batch-size", 8, "--lr", 0.02, "--rank", 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"))


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def preference(kind: str) -> dict[str, Any]:
    """A random one; what is chosen is always one word longer."""
    prompt, rejected = words(3), words(3)
    chosen = f"{words(1)} {rejected}"
    if kind == "texts":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    asked = message("user", prompt)
    answers = {n: message("assistant", t) for n, t in (("chosen", chosen), ("rejected", rejected))}
    if kind == "chats":
        return {"prompt": asked, **answers}
    return {name: asked + answer for name, answer in answers.items()}  # "whole chats"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def log_prob(model: Any, tokenizer: Any, row: dict[str, Any], answer: str) -> Tensor:
    """Of an answer after its prompt, tokenized by hand as the template has it."""
    prompt, said = row.get("prompt"), row[answer]
    if isinstance(said, list):
        prompt = "a {} the".format((prompt or said)[0]["content"])
        said = said[-1]["content"]
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(f"{said} [SEP]")["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([before + after])).logits[0, :-1].log_softmax(-1)
    return scores[torch.arange(len(scores)), torch.tensor((before + after)[1:])][
        -len(after) :
    ].sum()


@pytest.mark.parametrize("kind", ["texts", "chats", "whole chats"])
@pytest.mark.parametrize("method", ["rosa", "lora", "full", "dora"])
def test_the_loss_is_dpos_against_the_pretrained_model(model, tmp_path, method, kind, capsys):
    held = [preference(kind) for _ in range(11)]
    files = ["--train", write(tmp_path / "t.jsonl", [preference(kind) for _ in range(40)])]
    files += ["--validation", write(tmp_path / "v.jsonl", held)]
    how = [*QUICK, *(["--resample-every", 4] if method == "rosa" else [])]
    if method == "full":
        how = ["--preference", "--steps", 12, "--batch-size", 8, "--lr", 0.005]
    out = tmp_path / "run"
    how += ["--beta", 0.3, "--method", method, "--eval-batch-size", 4]
    run("train", "--model", model, *files, *how, "--output", out)
    metrics = json.loads((out / "metrics.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    if method == "full":
        trained = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    else:
        assert not (out / "adapter" / "ref").exists()
        fresh = AutoModelForCausalLM.from_pretrained(model)
        trained = PeftModel.from_pretrained(fresh, out / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    gains = [
        [log_prob(trained, tokenizer, row, n) - log_prob(base, tokenizer, row, n)
         for n in ("chosen", "rejected")]
        for row in held
    ]  # fmt: skip
    margins = 0.3 * torch.stack([chosen - rejected for chosen, rejected in gains])
    assert metrics["loss"] == pytest.approx(float(-logsigmoid(margins).mean()), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(float((margins > 0).float().mean()), abs=1e-6)
    assert "perplexity" not in metrics
    assert metrics["train_loss"] < 0.69
    assert metrics["resamples"] >= (2 if method == "rosa" else 0)
    capsys.readouterr()
    run("generate", out, "--prompt", "film", "--max-new-tokens", 3)


SPLITS = {
    ("film: good", "film: bad"): ("film:", " good", " bad"),
    ("It is unhappy", "It is unhelpful"): ("It is", " unhappy", " unhelpful"),
    ("very film", "very fine"): ("very", " film", " fine"),
    ("the film was good", "the film was good very"): ("the film was", " good", " good very"),
    ("a\n\nb: yes", "a\n\nb: no "): ("a\n\nb:", " yes", " no "),
    ("ä ö 🙂x", "ä ö 🙂y"): ("ä ö", " 🙂x", " 🙂y"),
}


@pytest.mark.parametrize("answers", SPLITS)
def test_what_texts_begin_with_is_whole_words(tmp_path, answers):
    row = dict(zip(("chosen", "rejected"), answers, strict=True))
    found = read_preferences(write(tmp_path / "t.jsonl", [row]))[0]
    assert (found["prompt"], found["chosen"], found["rejected"]) == SPLITS[answers]
    for name, whole in row.items():
        assert found["prompt"] + found[name] == whole


def test_it_goes_on_where_it_was_stopped(model, tmp_path):
    rows = write(tmp_path / "t.jsonl", [preference("chats") for _ in range(40)])
    how = ["--model", model, "--train", rows, *QUICK, "--resample-every", 2, "--method", "rosa"]
    run("train", *how, "--output", tmp_path / "whole")
    run("train", *how, "--output", tmp_path / "part")
    part = tmp_path / "part"
    for name in ("metrics.json", "history.json"):
        (part / name).unlink()
    newest = max((part / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    run("train", *how, "--output", part, "--resume")
    a, b = ((tmp_path / n / "adapter/adapter_model.safetensors") for n in ("whole", "part"))
    assert a.read_bytes() == b.read_bytes()


def test_a_dry_run_counts_both_answers(model, tmp_path, capsys):
    rows = write(tmp_path / "t.jsonl", [preference("texts") for _ in range(30)])
    how = ["--train", rows, *QUICK, "--dry-run"]
    run("train", "--model", model, *how, "--output", tmp_path / "run")
    assert "longest row, tokens" in capsys.readouterr().out


GOOD = preference("texts")
CHATS = preference("chats")
BAD = {
    "equal answers": ([GOOD, {**GOOD, "chosen": GOOD["rejected"]}], "row 2: chosen and rejected"),
    "no rejected": ([{"prompt": "x", "chosen": "y"}], "no column 'rejected'"),
    "empty": ([GOOD, {**GOOD, "rejected": " "}], "row 2 has no text in column 'rejected'"),
    "a number": ([{**GOOD, "rejected": 3}], "row 1 has no text in column 'rejected'"),
    "mixed row": ([{**GOOD, "chosen": CHATS["chosen"]}], "row 1: of prompt, chosen, rejected some"),
    "mixed file": ([GOOD, CHATS], "row 2 is a chat, and the first a text"),
    "a role": (
        [{**CHATS, "chosen": message("robot", "x")}],
        "row 1, chosen: the role of message 1 is 'robot'",
    ),
    "the user answers": ([{**CHATS, "chosen": message("user", "x")}], "begins with the user"),
    "the user last": (
        [{**CHATS, "chosen": CHATS["chosen"] + message("user", "x")}],
        "row 1, chosen, ends with the user's message, which nothing answers",
    ),
    "a prompt missing": ([GOOD, {**GOOD, "prompt": None}], "row 2 has nothing in column 'prompt'"),
    "no order": (
        [{**CHATS, "prompt": CHATS["prompt"] + message("assistant", "x")}],
        "row 1, chosen after its prompt: message 3 is the assistant's, after the assistant's",
    ),
    "no prompt": (
        [{n: message("assistant", t) for n, t in (("chosen", "x"), ("rejected", "y"))}],
        "row 1 has no prompt, and its answers do not both begin with one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_are_no_preferences_are_named(model, tmp_path, capsys, case):
    rows, text = BAD[case]
    path = write(tmp_path / "t.jsonl", rows)
    how = ["--model", model, "--train", path, *QUICK, "--output", tmp_path / "run"]
    assert text in fails(capsys, "train", *how)
    assert not (tmp_path / "run").exists()


def test_files_of_two_forms_are_refused(model, tmp_path, capsys):
    texts, chats = (
        write(tmp_path / f"{kind}.jsonl", [preference(kind) for _ in range(20)])
        for kind in ("texts", "chats")
    )
    for one, other in ((texts, chats), (chats, texts)):
        how = ["--train", one, "--validation", other, *QUICK, "--output", tmp_path / "run"]
        said = " ".join(fails(capsys, "train", "--model", model, *how).split())
        assert f"{other.name}: row 1 is a" in said
        assert "write both alike" in said


def test_what_preferences_do_not_go_with_is_said(model, tmp_path, capsys):
    rows = write(tmp_path / "t.jsonl", [preference("texts") for _ in range(30)])
    how = ["--train", rows, "--output", tmp_path / "run"]
    assert "add --preference" in fails(capsys, "train", "--model", model, *how)
    how.append("--preference")
    for more, text in {
        "--packing": "not for preferences",
        "--group-by-length": "not for preferences",
        "--method=lora_ga": "not of preferences",
        "--beta=0": "beta must be positive",
        "--beta=nan": "beta must be positive",
        "--loss-on=all": "--loss-on is of chats",
        "--set=bias=all": "trained biases stay where the adapter is disabled",
        "--set=trainable_token_indices=[4,5]": "TRL cannot train",
    }.items():
        assert text in fails(capsys, "train", "--model", model, *how, more)
    said = fails(capsys, "train", "--model", model, *how[:-1], "--beta", 1)
    assert "--beta is of preferences" in said
    assert "has preferences" in fails(capsys, "evaluate", model, "--validation", rows)
    for method in ("pissa", "prompt"):
        found = fails(capsys, "train", "--model", model, *how, "--method", method)
        assert "DPO holds a model to what it was" in found
        assert not (tmp_path / "run").exists()
    long = write(tmp_path / "l.jsonl", [{**preference("texts"), "prompt": "film " * 30}] * 30)
    how = ["--train", long, "--output", tmp_path / "run", "--preference", "--max-length", 16]
    assert "no two answers differ" in fails(capsys, "train", "--model", model, *how)
    encoder = save_with_tokenizer(tiny_bert(), tmp_path / "encoder")
    how = ["--train", rows, "--output", tmp_path / "run", "--preference"]
    assert "needs a decoder" in fails(capsys, "train", "--model", encoder, *how)
    plain = chat_model(tmp_path / "plain", None, tiny_llama())
    rows = write(tmp_path / "c.jsonl", [preference("chats") for _ in range(30)])
    how = ["--train", rows, "--output", tmp_path / "run", "--preference"]
    assert "has no chat template" in fails(capsys, "train", "--model", plain, *how)
