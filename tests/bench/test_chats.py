"""`rosa train` on chats, and on texts that are packed: what is learned of them, and what is not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaForCausalLM

from rosa.bench.tasks import templates
from tests.chats import MARKED, PLAIN, chat, chat_model, words, write_chats
from tests.helpers import fails, run
from tests.models import save_with_tokenizer, tiny_bert, tiny_gpt2

pytest.importorskip("trl")
QUICK = ["--epochs", 2, "--batch-size", 8, "--lr", 0.01, "--resample-every", "epoch", "--rank", 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"))


def mean_loss(folder: Path, base: Path, chats: list[dict[str, Any]], answers: bool) -> float:
    """The mean over what is learned of the chats, chat by chat, by the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    losses = []
    for row in chats:
        ids, learned = [], []
        for message in row["messages"]:  # by hand, as the template has it
            own = message["role"] == "assistant"
            said = tokenizer(f"{message['content']} {'[SEP]' if own else ''}")["input_ids"]
            ids += tokenizer("the" if own else "a")["input_ids"] + said
            learned += [not answers] + [own or not answers] * len(said)
        with torch.no_grad():
            logits = trained(torch.tensor([ids])).logits[0, :-1]
        found = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        losses += found[torch.tensor(learned[1:])].tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_the_loss_of_a_chat_is_the_mean_over_the_words_to_learn(model, tmp_path, loss_on, capsys):
    chats = [chat(1 + i % 3, most=3) for i in range(20)]
    held, out = write_chats(tmp_path / "held.jsonl", chats), tmp_path / "run"
    files = ["--train", write_chats(tmp_path / "t.jsonl"), "--validation", held]
    run("train", "--model", model, *files, *QUICK, "--loss-on", loss_on, "--output", out)
    metrics = json.loads((out / "metrics.json").read_text())
    history = json.loads((out / "history.json").read_text())
    expected = mean_loss(out / "adapter", model, chats, loss_on == "answers")
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] == min(e["eval_loss"] for e in history["epochs"])
    assert metrics["resamples"] == 2
    assert AutoTokenizer.from_pretrained(out / "adapter").chat_template == MARKED
    capsys.readouterr()
    run("evaluate", out, "--validation", held)
    assert f"{expected:.4f}" in capsys.readouterr().out
    run("export", out, "--to", "merged", "--output", tmp_path / "plain")


@pytest.mark.parametrize("rows", ["chats", "pairs"])
def test_texts_in_one_row_do_not_see_each_other(model, tmp_path, rows):
    path = tmp_path / "t.jsonl"
    if rows == "chats":
        write_chats(path)
    else:
        lines = [json.dumps({"prompt": words(4), "completion": words(6)}) for _ in range(40)]
        path.write_text("\n".join(lines))
    found = {}
    for packing in ([], ["--packing"]):
        out = tmp_path / f"run{len(packing)}"
        # All in one step, whose gradient is the mean over all that is learned: the same either way.
        how = ["--steps", 4, "--batch-size", 40, "--lr", 0.01, "--directions", "orthonormal"]
        files = ["--train", path, "--validation", path, "--output", out, "--max-length", 32]
        run("train", "--model", model, *files, *how, *packing)
        history = json.loads((out / "history.json").read_text())
        found[len(packing)] = [e["train_loss"] for e in history["epochs"]]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


TEXT_PART = {"type": "text", "text": "good"}
USER, ASSISTANT, TOOL, SYSTEM = (
    {"role": role, "content": "good"} for role in ("user", "assistant", "tool", "system")
)
TURN = [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "row 2 has no messages"),
        ({"messages": "hello"}, "row 2 has no messages"),
        ({"text": "hello"}, "row 2 has no messages"),
        ({"messages": [{"content": "a"}]}, "row 2: the role of message 1 is None"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "is 'bot'; there are: system, user"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 2 has no message of the assistant"),
        ({"messages": [{"role": "user", "content": [1]}]}, "of message 1 (user) is no text"),
        ({"messages": [{"role": "assistant", "content": None}]}, "(assistant) is missing"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "(assistant) is empty"),
        ({"messages": [{"role": "user", "content": [TEXT_PART]}]}, "a list of texts: join them"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "is a call of tools, which"),
        ({"messages": TURN, "tools": [{"type": "function"}]}, "row 2 has tools, which are not put"),
        (["no", "object"], "row 2 is no object of columns with values"),
        ({"messages": ["a"]}, "row 2: the role of message 1 is None"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "message 1 is the assistant's, at the beg"),
        ({"messages": [TOOL, ASSISTANT]}, "message 1 is the tool's, at the beginning, where the"),
        ({"messages": [USER, *TURN]}, "2 is the user's, after the user's, where the assistant's"),
        ({"messages": [*TURN, ASSISTANT]}, "where the user's or the tool's belongs: join the two"),
        (
            {"messages": [*TURN, SYSTEM, *TURN]},
            "where the user's or the tool's belongs: put it first",
        ),
        ({"messages": [SYSTEM, ASSISTANT]}, "where the user's belongs: leave it out, or put one"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, "message 2 has tool_calls, which"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "message 2 has weight 0"),
        ({"messages": [{**USER, "content": "a \ud800"}, ASSISTANT]}, "row 2 has half of a char"),
        ({"messages": [*TURN, USER]}, "row 2 ends with the user's message, which nothing answers"),
        ({"messages": [*TURN, TOOL]}, "row 2 ends with the tool's message, which nothing answers"),
    ],
)
def test_rows_that_are_no_chats_are_named(model, tmp_path, capsys, row, message):
    path = write_chats(tmp_path / "t.jsonl", [chat(), row, *(chat() for _ in range(9))])
    out = tmp_path / "run"
    assert message in fails(capsys, "train", "--model", model, "--train", path, "--output", out)
    assert not out.exists()


def test_chats_in_every_right_order_are_learned(model, tmp_path):
    rows = [
        [SYSTEM, *TURN],
        [*TURN, *TURN],
        [*TURN, TOOL, ASSISTANT],
        [*TURN, TOOL, TOOL, *TURN[1:]],
    ]
    path = write_chats(tmp_path / "t.jsonl", [{"messages": row} for row in rows * 5])
    run("train", "--model", model, "--train", path, "--output", tmp_path / "run", *QUICK)


def test_chats_that_cannot_be_learned_are_refused_before_any_work(model, tmp_path, capsys):
    path, out = write_chats(tmp_path / "t.jsonl"), tmp_path / "run"

    def refused(*how: Any, base: Path = model) -> str:
        return fails(capsys, "train", "--model", base, "--train", path, "--output", out, *how)

    bare = chat_model(tmp_path / "bare", None)
    plain = chat_model(tmp_path / "plain", PLAIN)
    encoder = save_with_tokenizer(tiny_bert(), tmp_path / "encoder")
    assert "has no chat template: it is no chat model's" in refused(base=bare)
    assert "put {% generation %} and {% endgeneration %} around" in refused(base=plain)
    assert "chats are for a decoder" in refused(base=encoder)
    assert "chat template nowhere.jinja is not there" in refused("--chat-template", "nowhere.jinja")
    strict = tmp_path / "strict.jinja"
    strict.write_text(MARKED + "{{ raise_exception('no such order') }}")
    assert "cannot take the chat in row" in refused("--chat-template", strict)
    broken = tmp_path / "broken.jinja"
    for content in (MARKED + "\n{% if %}", "{% for m in messages %}\n{{ m"):
        broken.write_text(content)
        said = refused("--chat-template", broken)
        assert f"{broken} is no template of Jinja's: line 2: " in " ".join(said.split())
    assert "loss_on must be one of answers, all" in refused("--loss-on", "some")
    long = [{"role": "user", "content": words(30, 30)}, {"role": "assistant", "content": "good"}]
    write_chats(path, [{"messages": long}] * 20)
    assert "within the first 32 tokens: the model reads no more, so shorten" in refused()
    assert "within the first 16 tokens: raise --max-length" in refused("--max-length", 16)
    path.write_text((json.dumps({"prompt": "good", "completion": "film"}) + "\n") * 5)
    assert "--loss-on is for chats, which these rows are not" in refused("--loss-on", "all")
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "x"}]}) + "\n")
    assert "A decoder learns rows of text, of prompt and completion, of messages" in refused()
    assert not out.exists()


def test_a_head_that_trl_cannot_compute_is_refused(tmp_path, capsys):
    path = write_chats(tmp_path / "t.jsonl")
    untied = chat_model(tmp_path / "untied", model=tiny_gpt2(tied=False))
    how = ["train", "--train", path, "--output", tmp_path / "run", "--model"]
    said = fails(capsys, *how, untied, "--target-modules", "lm_head")
    assert "TRL cannot train GPT2LMHeadModel" in said
    assert not (tmp_path / "run").exists()
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, is_decoder=True, initializer_range=0.5,
    )  # fmt: skip
    roberta = chat_model(tmp_path / "roberta", model=RobertaForCausalLM(config))
    said = fails(capsys, *how, roberta)
    assert "TRL computes another loss than RobertaForCausalLM" in said


def test_factors_beside_quantized_weights_stay_in_full_precision(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "run"
    files = ["--train", write_chats(tmp_path / "t.jsonl"), "--output", out, "--load-in", "4bit"]
    run("train", "--model", model, *files, *QUICK)
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}


def test_what_is_cut_is_told(model, tmp_path, capsys):
    long = [{"role": "user", "content": words(30, 30)}, {"role": "assistant", "content": "good"}]
    later = [{"role": "user", "content": "good"}, {"role": "assistant", "content": words(40, 40)}]
    rows = [{"messages": m} for m in (long, later) for _ in range(10)]
    files = ["--train", write_chats(tmp_path / "t.jsonl", rows)]
    files += ["--validation", write_chats(tmp_path / "v.jsonl")]
    run("train", "--model", model, *files, *QUICK, "--output", tmp_path / "run")
    printed = capsys.readouterr().out
    said = " ".join(printed.split())
    assert "t.jsonl: 10 of 20 texts have nothing to learn within the first 32 tokens" in said
    assert "(rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)" in said
    assert "10 of 10 training texts reach 32 tokens" in printed


def test_of_many_rows_the_first_ten_are_named_and_of_which_file(model, tmp_path, capsys):
    long = {"messages": [{"role": "user", "content": words(30, 30)}, ASSISTANT]}
    path = write_chats(tmp_path / "t.jsonl", [long] * 30 + [chat() for _ in range(30)])
    other = write_chats(tmp_path / "v.jsonl", [chat(), long])
    files = ["--train", path, "--validation", other]
    run("train", "--model", model, *files, *QUICK, "--output", tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "t.jsonl: 30 of 60 texts have" in said
    assert "(rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)" in said
    assert "v.jsonl: 1 of 2 texts have" in said
    assert "(row 2)" in said
    write_chats(other, [long])
    how = ["--model", model, *files, *QUICK, "--output", tmp_path / "other"]
    said = " ".join(fails(capsys, "train", *how).split())
    assert "v.jsonl (row 1): no completion or answer is within the first 32 tokens" in said
    seen = set()
    for place in range(10):  # of which one is held out
        rows = [{"messages": [*TURN]} for _ in range(9)]
        rows.insert(place, long)
        path = write_chats(path, rows)
        how = ["--model", model, "--train", path, *QUICK, "--dry-run"]
        with contextlib.suppress(SystemExit):
            run("train", *how, "--output", tmp_path / "dry")
        captured = capsys.readouterr()
        said = " ".join((captured.out + captured.err).split())
        held = f"the rows held out to validate (row {place + 1}): no" in said
        assert held or ("1 of 9" in said and f"(row {place + 1})" in said)
        seen.add(held)
    assert seen == {False, True}


def test_a_given_template_and_trls_own_form_of_a_known_one(tmp_path, capsys):
    plain, path = chat_model(tmp_path / "plain", PLAIN), write_chats(tmp_path / "t.jsonl")
    template = tmp_path / "mine.jinja"
    template.write_text(MARKED)
    files, out = ["--model", plain, "--train", path], tmp_path / "run"
    run("train", *files, *QUICK, "--chat-template", template, "--output", out)
    assert AutoTokenizer.from_pretrained(out / "adapter").chat_template == MARKED
    run("train", *files, *QUICK, "--loss-on", "all", "--output", tmp_path / "all")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer.chat_template = qwen2_5_chat_template
    assert "{% generation %}" in (templates.learned_template(tokenizer, "answers") or "")
    assert templates.learned_template(tokenizer, "all") is None


def test_without_trl_the_extra_is_named(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(templates, "find_spec", lambda name: None)
    path, out = write_chats(tmp_path / "t.jsonl"), tmp_path / "run"
    for how in ([], ["--packing"]):
        said = fails(capsys, "train", "--model", model, "--train", path, "--output", out, *how)
        assert "pip install 'rosa-finetune[chat]'" in said
    assert not out.exists()


def test_packing_is_refused_where_it_has_no_sense(model, tmp_path, capsys, monkeypatch):
    encoder = save_with_tokenizer(tiny_bert(), tmp_path / "encoder")
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "good,1\nbad,0\n" * 20)
    how = ["--packing", "--output", tmp_path / "run"]
    said = fails(capsys, "train", "--model", encoder, "--train", table, *how)
    assert "--packing is for a decoder's texts" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = fails(capsys, "train", "--model", model, "--train", table, *how)
    assert "--packing is for one process" in said
