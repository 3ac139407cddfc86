"""`rosa generate`: what a trained decoder writes, from any of its folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.chats import PLAIN, chat_model
from tests.helpers import fails, run
from tests.models import save_with_tokenizer, tiny_bert, tiny_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A trained `run` and its merged `plain` model."""
    folder = tmp_path_factory.mktemp("generate")
    base, rows = chat_model(folder / "base", PLAIN), folder / "t.jsonl"
    rows.write_text(json.dumps({"prompt": "film", "completion": " was very good"}) + "\n")
    rows.write_text(rows.read_text() * 30)
    how = ["--steps", 20, "--batch-size", 8, "--lr", 0.02, "--resample-every", 8]
    how += ["--target-modules", "all-linear"]
    run("train", "--model", base, "--train", rows, *how, "--output", folder / "run")
    run("export", folder / "run", "--to", "merged", "--output", folder / "plain")
    return folder


def expected(folder: Path, text: str, tokens: int = 6) -> str:
    """Word by word, the likeliest, by the plain model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder / "plain").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "plain")
    ids, new = tokenizer(text)["input_ids"], []
    for _ in range(min(tokens, 32 - len(ids))):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


def printed(capsys, *arguments: Any) -> str:
    capsys.readouterr()
    run("generate", *arguments)
    return capsys.readouterr().out


def test_any_folder_writes_the_same(folder, capsys):
    wanted = expected(folder, "the film")
    assert wanted
    for place in ("run", "run/adapter", "plain"):
        how = ["--prompt", "the film", "--max-new-tokens", 6]
        assert printed(capsys, folder / place, *how).strip() == wanted.strip()


def test_a_chat_at_the_terminal_remembers_what_was_said(folder, capsys, monkeypatch):
    said = iter(["good film", "bad book", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    found = printed(capsys, folder / "run", "--max-new-tokens", 6).splitlines()
    first = expected(folder, "a good film the")
    second = expected(folder, f"a good film the {first}[SEP] a bad book the")
    assert [line.strip() for line in found] == [first.strip(), second.strip()]


def test_one_message_is_answered_as_in_a_chat(folder, capsys):
    how = [folder / "run", "--max-new-tokens", 6]
    found = printed(capsys, *how, "--message", "good film", "--system", "the book")
    assert found.strip() == expected(folder, "a the book a good film the").strip()
    whole = "film was very good"  # as trained: nothing comes after it
    run("generate", folder / "run", "--max-new-tokens", 1, "--prompt", whole)
    assert "--message asks as in a chat" in capsys.readouterr().err


def test_a_file_of_prompts_gives_a_line_of_json_each(folder, tmp_path, capsys):
    chats = [{"messages": [{"role": "user", "content": "good film"}]}]
    chats[0]["messages"].append({"role": "assistant", "content": "asked anew"})
    files = {
        "t.txt": ("the film\n\na book\n", ["the film", "a book"]),
        "t.jsonl": (json.dumps({"prompt": "the film", "completion": "x"}), ["the film"]),
        "c.jsonl": (json.dumps(chats[0]), ["a good film the"]),
    }
    for name, (content, prompts) in files.items():
        (tmp_path / name).write_text(content)
        how = ["--file", tmp_path / name, "--max-new-tokens", 6]
        lines = printed(capsys, folder / "run", *how).strip().splitlines()
        found = [json.loads(line)["text"] for line in lines]
        assert found == [expected(folder, prompt) for prompt in prompts]


def test_chance_goes_by_its_seed(folder, capsys):
    how = [folder / "run", "--prompt", "the", "--temperature", 3, "--max-new-tokens", 20]
    texts = [printed(capsys, *how, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_what_cannot_write_is_told(folder, tmp_path, capsys):
    encoder = save_with_tokenizer(tiny_bert(), tmp_path / "encoder")
    bare = save_with_tokenizer(tiny_gpt2(), tmp_path / "bare")
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": ""}))
    long = tmp_path / "long.jsonl"
    long.write_text("\n".join(json.dumps({"prompt": "film " * n}) for n in (1, 40)))
    user, system, own = ({"role": r, "content": "a"} for r in ("user", "system", "assistant"))
    chats = {}
    for name, messages in {"system": [system], "twice": [user, own, own], "own": [own]}.items():
        chats[name] = tmp_path / f"{name}.jsonl"
        chats[name].write_text(json.dumps({"messages": messages}))
    out = folder / "run"
    for how, message in [
        ([encoder, "--prompt", "a"], "writes no text, as a classifier"),
        ([bare], "has no chat template: give a --prompt"),
        ([out, "--prompt", "a", "--file", empty], "give one of --prompt, --message and --file"),
        ([out, "--prompt", "a", "--message", "b"], "give one of --prompt, --message and --file"),
        ([out, "--prompt", "a", "--system", "b"], "--system is of a chat"),
        ([bare, "--message", "a"], "has no chat template: give a --prompt"),
        ([out, "--file", empty], "row 1 has no prompt"),
        ([out, "--file", long], "long.jsonl: row 2: the prompt has 40 tokens, the model reads 32"),
        ([out, "--file", chats["system"]], "row 1 has nothing to answer: no message of the user"),
        ([out, "--file", chats["twice"]], "row 1: message 3 is the assistant's, after the"),
        ([out, "--file", chats["own"]], "row 1: message 1 is the assistant's, at the beginning"),
        ([out, "--message", " "], "--message is empty"),
        ([out, "--message", "a", "--system", ""], "--system is empty"),
        ([out, "--prompt", "film " * 40], "has 40 tokens, the model reads 32 in all"),
        ([out, "--prompt", " "], "the prompt has no words"),
        ([out, "--prompt", "a", "--temperature", -1], "temperature must not be negative"),
        ([out, "--prompt", "a", "--top-p", 0], "top_p must be above 0"),
        ([out, "--prompt", "a", "--max-new-tokens", 0], "max_new_tokens must be at least 1"),
        ([folder / "nowhere"], "is not a folder"),
    ]:
        assert message in fails(capsys, "generate", *how)
