"""E2E: its files, the texts that a decoder writes, and their scores."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from rosa.bench.tasks import load
from rosa.bench.tasks.generation_metrics import bleu, e2e_scores, nist
from rosa.bench.tasks.task import DataSettings
from rosa.bench.train import generation
from rosa.bench.train.generation import generate
from tests.helpers import fails, run, write_e2e
from tests.models import save_with_tokenizer, tiny_gpt2

OUTPUTS = [
    "The harbour cafe serves 3.50-pound soup, and it's cheap.",
    "A quiet place near the river, rated 4 out of 5.",
    "Children are not welcome.",
]
REFERENCES = [
    [
        "The harbour cafe sells cheap soup for 3.50 pounds.",
        "At the harbour, a cafe serves soup; it's cheap.",
    ],
    [
        "A quiet place by the river with a rating of 4 out of 5.",
        "Near the river there is a quiet place, rated 4 out of 5.",
        "It is quiet, near the river.",
    ],
    ["It does not welcome children."],
]
# What the challenge's own scorer (tuetschek/e2e-metrics, with -p) prints for them.
JUDGE = {"bleu": 39.83, "nist": 4.6088, "meteor": 0.4345, "rouge_l": 0.6524, "cider": 3.0015}
JAVA = shutil.which("java") and importlib.util.find_spec("pycocoevalcap")


def test_bleu_and_nist_are_the_challenges():
    assert bleu(OUTPUTS, REFERENCES) == pytest.approx(JUDGE["bleu"], abs=0.005)
    assert nist(OUTPUTS, REFERENCES) == pytest.approx(JUDGE["nist"], abs=5e-5)


@pytest.mark.skipif(not JAVA, reason="needs Java and pip install 'rosa-finetune[e2e]'")
def test_all_scores_are_the_challenges():
    assert e2e_scores(OUTPUTS, REFERENCES) == pytest.approx(JUDGE, abs=0.005)


def test_perfect_and_empty_texts():
    same = [texts[0] for texts in REFERENCES]
    assert bleu(same, REFERENCES) == pytest.approx(100)
    assert nist(same, REFERENCES) > nist(OUTPUTS, REFERENCES)
    assert nist(["", "", ""], REFERENCES) == 0
    assert bleu(["", "", ""], REFERENCES) == 0


def test_scores_without_java_leave_some_out_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert set(e2e_scores(OUTPUTS, REFERENCES)) == {"bleu", "nist"}
    assert "METEOR, ROUGE-L and CIDEr are left out" in capsys.readouterr().out


@pytest.mark.parametrize("references", [REFERENCES[:2], [*REFERENCES[:2], []]])
def test_texts_without_references_are_refused(references):
    with pytest.raises(ValueError, match="at least one reference for each"):
        e2e_scores(OUTPUTS, references)


def test_meaning_representations_are_held_out_whole_and_references_grouped(tmp_path):
    write_e2e(tmp_path)
    task = load(DataSettings(task="e2e", data=tmp_path, limit_test=3), decoder=True)
    assert len(task.train) == 36
    assert len(task.validation) == 4
    assert not set(task.train["prompt"]) & set(task.validation["prompt"])
    assert task.train[0] == {
        "prompt": "Input: name[P0], food[soup] Output:",
        "completion": " P0 has a soup.",
    }
    assert len(task.generation.prompts) == 3
    for shown, texts in zip(task.generation.prompts, task.generation.references, strict=True):
        name = shown.removeprefix("Input: name[").removesuffix("], food[soup] Output:")
        assert texts == (f"{name} has a soup.", f"{name} has b soup.")
    write_e2e(tmp_path, train=True)
    task = load(DataSettings(task="e2e", data=tmp_path, hold_out=True), decoder=True)
    assert (len(task.train), len(task.validation), task.reported) == (40, 40, "bleu")


def test_batches_write_what_single_prompts_do(tmp_path):
    """Padding on the left, and the order of the batches, change nothing."""
    save_with_tokenizer(tiny_gpt2(), tmp_path)
    model, tokenizer = tiny_gpt2().eval(), AutoTokenizer.from_pretrained(tmp_path)
    model.config.vocab_size = 14
    model.resize_token_embeddings(14)
    prompts = ["the film was", "book", "a very good book was the", "bad film"]
    how = {"beams": 2, "max_new_tokens": 5, "no_repeat_ngram": 0}
    together = generate(model, tokenizer, prompts, batch_size=3, **how)
    alone = [generate(model, tokenizer, [p], **how)[0] for p in prompts]
    assert together == alone
    assert tokenizer.padding_side == "right"
    ids = tokenizer(prompts[0], return_tensors="pt")
    with torch.no_grad():
        found = model.generate(
            **ids,
            num_beams=2,
            max_new_tokens=5,
            early_stopping=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    expected = tokenizer.decode(found[0, 3:], skip_special_tokens=True)
    assert together[0] == expected.strip()


class Repeats(GPT2LMHeadModel):
    """After each token it likes best the next one of what it was told, in a circle."""

    def forward(self, input_ids, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits[:] = torch.arange(out.logits.shape[-1]) / 1000  # then whatever comes last
        for row, token in enumerate(input_ids[:, -1]):
            place = self.told.index(int(token)) if int(token) in self.told else -1
            out.logits[row, -1, self.told[(place + 1) % len(self.told)]] = 9.0
        return out


def test_a_text_may_take_from_its_prompt_and_not_twice(tmp_path):
    save_with_tokenizer(tiny_gpt2(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model, prompt = Repeats(tiny_gpt2().config).eval(), "the film was a very good book"
    model.told = tokenizer(prompt)["input_ids"]
    how = {"beams": 1, "max_new_tokens": 12}
    model.generation_config.no_repeat_ngram_size = 1  # is the model's, not the task's
    free, *_ = generate(model, tokenizer, [prompt], no_repeat_ngram=0, **how)
    assert free == "the film was a very good book the film was a very"
    held, *_ = generate(model, tokenizer, [prompt], no_repeat_ngram=4, **how)
    assert held.startswith("the film was a very good book the film was")
    assert not held.startswith("the film was a very good book the film was a")


def test_a_run_scores_its_texts_and_keeps_them(tmp_path, capsys):
    base = save_with_tokenizer(tiny_gpt2(), tmp_path / "base")
    write_e2e(tmp_path)
    out = tmp_path / "run"
    data = ["--model", base, "--task", "e2e", "--data", tmp_path, "--limit-test", 2]
    # A row's reference is longer than the tiny model reads, unless its prompt is short.
    run("train", *data, "--rank", 2, "--epochs", 1, "--limit-train", 8, "--output", out)
    record = json.loads((out / "metrics.json").read_text())
    texts = json.loads((out / "predictions.json").read_text())["texts"]
    assert len(texts) == 2
    answers = [row["references"] for row in texts]
    assert record["bleu"] == pytest.approx(bleu([row["text"] for row in texts], answers))
    assert record["reported"] == "bleu"
    message = fails(capsys, "train", *data, "--limit-test", 0, "--output", tmp_path / "x")
    assert "limit_test must be at least 1" in message


def test_texts_may_be_as_long_as_those_learned(tmp_path, monkeypatch):
    base = save_with_tokenizer(tiny_gpt2(), tmp_path / "base")
    write_e2e(tmp_path)
    asked, written = [], generation.generate

    def keep(*args, **how):
        asked.append(how["max_new_tokens"])
        return written(*args, **how)

    monkeypatch.setattr(generation, "generate", keep)
    data = ["--model", base, "--task", "e2e", "--data", tmp_path, "--limit-test", 2]
    run("train", *data, "--rank", 2, "--epochs", 1, "--limit-train", 8, "--output", tmp_path / "1")
    monkeypatch.setattr(generation, "LEAST_ROOM", 1)
    run("train", *data, "--rank", 2, "--epochs", 1, "--limit-train", 8, "--output", tmp_path / "2")
    longest = len(AutoTokenizer.from_pretrained(base)(" P0 has a soup.")["input_ids"])
    assert asked == [80, longest + 1]  # with the end
