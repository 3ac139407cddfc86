"""`rosa shift`: a small decoder is pretrained on one kind of text and adapted to another.

There the rank of the change is what holds LoRA back, so this is the task that shows what drawing
subspaces again is for. What is learned is the loss on the target text, what is forgotten that on
the source text. Texts and model are made once, in a cache folder under a hash of what they are
made from:

<cache>/<hash>/pretraining/   the source text with a little of the target: see `tasks.corpus`
<cache>/<hash>/adaptation/    the target text, with the source's test part as a further text
<cache>/<hash>/model/         the pretrained decoder and its tokenizer
<cache>/<hash>/start.json     its losses on both texts: written last, so it marks a finished folder

The comparison itself is that of `rosa compare`: the same cells, tuning and reports.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rosa.bench.setup.methods import METHODS
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import models, runs
from rosa.bench.tasks.files import read_text
from rosa.errors import UserError

START = "start.json"
TARGET_SHARE = 0.05
"""Of the pretraining text: a decoder that never saw the target's words could not read them."""
HELD_OUT = {"test": 200_000, "validation": 100_000}
"""Characters at the end of a text, or a twentieth of a short one each."""
LEAST_PIECES = 200
"""How many pieces of the context's length, at four characters a token, a text must have."""
UNKNOWN = 0.2
"""Share of unknown tokens from which on a tokenizer is said not to know a text."""
BEST = {"rosa": 1e-2, "lora": 1e-2, "full": 2e-3}
"""The best learning rates of a wider choice: models this small take larger ones than usual."""


@dataclass(frozen=True)
class Pretraining:
    """The decoder that is made, and how it is trained."""

    vocabulary: int = 1024
    layers: int = 4
    width: int = 128
    heads: int = 4
    steps: int = 2000
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.1


@dataclass(frozen=True)
class World:
    """What a shift is measured in.

    Attributes:
        model: the pretrained decoder.
        data: the folder of the texts to adapt it to.
        start: its losses before, as a run's record calls them.
    """

    model: str
    data: Path
    start: dict[str, float]


def default_cache() -> Path:
    """The folder beside the hub's own cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "rosa" / "shift"


def rates_for(methods: list[str]) -> list[str]:
    """The learning rates, as `--lrs` takes them: the best of the methods of the first look.

    For any other choice of methods, three for each: the best of the nearest one, a third and three
    times as much.
    """
    if set(methods) <= set(BEST):
        return [f"{name}={BEST[name]:g}" for name in methods]
    in_full = [name for name, method in METHODS.items() if name in methods and method.in_full]
    return ["3e-3,1e-2,3e-2", *(f"{name}=7e-4,2e-3,6e-3" for name in in_full)]


def load_texts(source: Path | None, target: Path | None) -> tuple[str, str]:
    """The two texts: of files, or Python's own prose and code.

    Raises:
        FileNotFoundError, UserError: one is given without the other, both are the same, or a file
            is missing, empty or no text.
    """
    if (source is None) != (target is None):
        raise UserError("give --source and --target, or neither for the built-in texts")
    if source is None or target is None:
        from rosa.bench.tasks.python_texts import prose_and_code

        return prose_and_code()
    texts = read_text(source), read_text(target)
    if texts[0] == texts[1]:
        raise UserError(f"{source} and {target} hold the same text: there is no shift between them")
    return texts


def prepare(
    texts: tuple[str, str],
    cache: Path,
    context: int,
    model: str | None = None,
    pretraining: Pretraining | None = None,
    say: Any = print,
) -> World:
    """The parts of the texts and the pretrained model, from the cache or made now.

    Args:
        texts: source and target.
        cache: the folder of all that was made.
        context: tokens of a piece of text.
        model: a pretrained decoder, by its folder or hub id, to be used instead of making one.
        pretraining: of the one that is made; None takes the defaults.
        say: takes a line about what is done.

    Raises:
        UserError: a text is too short, the model is no decoder or cannot read the target, or
            another process writes to the folder. Nothing was trained then.
    """
    parts = [
        split(name, text, context) for name, text in zip(("source", "target"), texts, strict=True)
    ]
    if model is None:
        pretraining = pretraining or Pretraining()
    else:
        pretraining = None
        _check_decoder(model, parts[1]["test"])
    of_model = model if pretraining is None else asdict(pretraining)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    about = {"texts": digests, "context": context, "model": of_model}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / name
    place = str(folder / "model") if model is None else model
    if not (folder / START).is_file():  # what is finished nobody writes to
        taken = f"another process is preparing {folder}: wait for it, or name another --cache"
        with runs.alone_in(folder, taken):
            if not (folder / START).is_file():
                _write_texts(folder, *parts)
                if pretraining is not None:
                    _pretrain(folder, context, pretraining, say)
                say("the pretrained model's losses on both texts")
                start = _start(place, folder / "adaptation", folder / "start", context)
                runs.write_json(folder / START, start)
    return World(place, folder / "adaptation", runs.read_json(folder / START))


def split(name: str, text: str, context: int) -> dict[str, str]:
    """A text's parts for training, validation and test: its end, cut between lines, is held out.

    Raises:
        UserError: it is too short.
    """
    least = LEAST_PIECES * context * 4
    if len(text) < least:
        raise UserError(
            f"the {name} text has {len(text):,} characters, and a context of {context} tokens asks "
            f"for {least:,}: give more text, or lower --max-length"
        )
    parts, end = {}, len(text)
    for part, most in HELD_OUT.items():
        cut = text.rfind("\n", 0, end - min(most, len(text) // 20)) + 1
        cut = cut if cut > len(text) // 2 else end - min(most, len(text) // 20)  # one long line
        parts[part], end = text[cut:end], cut
    return {"train": text[:end], **parts}


def _write_texts(folder: Path, source: dict[str, str], target: dict[str, str]) -> None:
    some = target["train"][: round(TARGET_SHARE * len(source["train"]))]
    texts = {
        "pretraining": {**source, "train": f"{source['train']}\n{some}"},
        "adaptation": {**target, "source": source["test"]},
    }
    for place, parts in texts.items():
        (folder / place).mkdir(exist_ok=True)
        for part, text in parts.items():
            (folder / place / f"{part}.txt").write_text(text, encoding="utf-8", newline="\n")


def _check_decoder(model: str, text: str) -> None:

    models.check_model(model)
    if not models.is_decoder(models.load_config(model)):
        raise UserError(f"{model} is no decoder: a shift is of a model that writes text, as gpt2")
    tokenizer = models.load_tokenizer(model)
    ids = tokenizer(text[:20_000], add_special_tokens=False)["input_ids"]
    unknown = ids.count(tokenizer.unk_token_id) / max(len(ids), 1)
    if not ids or unknown > UNKNOWN:
        raise UserError(
            f"the tokenizer of {model} does not know the target text ({unknown:.0%} of it are "
            "unknown tokens): choose a model of that language"
        )


def _pretrain(folder: Path, context: int, how: Pretraining, say: Any) -> None:
    """Make the decoder and its tokenizer; goes on where an earlier call was stopped."""
    from rosa.bench.train.training import train

    run, initial = folder / "pretraining-run", folder / "initial"
    resume = bool(runs.settings_of(run))
    if not resume:
        _make_decoder(initial, folder / "pretraining" / "train.txt", context, how)
    say(f"pretraining a decoder on the source text, {how.steps} steps: once, kept in {folder}")
    settings = RunSettings(
        model=str(initial),
        output=run,
        method="full",
        task="corpus",
        data=folder / "pretraining",
        steps=how.steps,
        batch_size=how.batch_size,
        lr=how.lr,
        weight_decay=how.weight_decay,
        max_length=context,
    )
    train(settings, resume=resume)
    if (run / runs.MODEL).is_dir():  # else a call before this one was stopped here
        shutil.rmtree(folder / "model", ignore_errors=True)
        (run / runs.MODEL).rename(folder / "model")
    shutil.rmtree(run)
    shutil.rmtree(initial)


def _make_decoder(place: Path, text: Path, context: int, how: Pretraining) -> None:
    """A random Llama with a byte-level BPE tokenizer trained on the text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    end, alphabet = "<|end|>", pre_tokenizers.ByteLevel.alphabet()
    bpe.train(
        [str(text)],
        trainers.BpeTrainer(
            vocab_size=how.vocabulary,
            special_tokens=[end],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, pad_token=end, model_max_length=context
    )
    config = LlamaConfig(
        vocab_size=how.vocabulary,
        hidden_size=how.width,
        intermediate_size=8 * how.width // 3,
        num_hidden_layers=how.layers,
        num_attention_heads=how.heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=bpe.token_to_id(end),
        eos_token_id=bpe.token_to_id(end),
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)


def _start(model: str, data: Path, output: Path, context: int) -> dict[str, float]:
    from rosa.bench.train.evaluating import evaluate_base

    settings = RunSettings(
        model=model, output=output, method="full", task="corpus", data=data, max_length=context
    )
    return evaluate_base(settings)
