"""Texts from a decoder, in batches, with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rosa.errors import UserError

LEAST_ROOM = 80
"""Tokens that a text may have, be those learned from shorter."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    reads: int | None = None,
    batch_size: int = 16,
    beams: int = 5,
    no_repeat_ngram: int = 4,
    max_new_tokens: int = LEAST_ROOM,
) -> list[str]:
    """What the model writes after each prompt, up to the end of the text or of the line.

    The defaults are the paper's for E2E: beam search of 5, no 4-gram twice in a text. What a text
    takes from its prompt, such as a name of many tokens, is not counted, as in the code of the
    LoRA paper, whose decoding it is; transformers' own `no_repeat_ngram_size` counts it.

    Args:
        model: a causal language model, on its device.
        tokenizer: the model's.
        prompts: the texts to continue.
        reads: the most tokens that the model reads at once; None if any number.
        batch_size: prompts at a time; prompts of like length share a batch.
        beams: width of the beam search.
        no_repeat_ngram: no n-gram of this length comes twice in a text; 0 lets any.
        max_new_tokens: where a text is cut, if the model can write that far.

    Raises:
        ValueError: a prompt leaves the model no room to write.
    """
    import torch
    from rich.progress import track

    reads = reads or 2**30
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # the texts begin at the right
    texts = [""] * len(prompts)
    try:
        for batch in track(batches, "Generating"):
            inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True)
            inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
            length = inputs["input_ids"].shape[1]
            room = reads - length
            if room < 1:
                raise UserError(
                    f"a prompt of {length} tokens leaves no room to write: the model reads "
                    f"{length + room} in all ({prompts[batch[-1]][:60]}...)"
                )
            with torch.no_grad():
                found = model.generate(
                    **inputs,
                    num_beams=beams,
                    no_repeat_ngram_size=0,  # the model's own rule counts the prompt
                    logits_processor=_no_repeats(no_repeat_ngram, length),
                    max_new_tokens=min(max_new_tokens, room),
                    do_sample=False,
                    early_stopping=True,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            new = found[:, length:]
            for i, text in zip(
                batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                texts[i] = text.strip().split("\n")[0].strip()
    finally:
        tokenizer.padding_side = side
    return texts


def _no_repeats(n: int, begin: int) -> list[Any]:
    """Transformers' rule that no n-gram comes twice, for what is written from a place on."""
    from transformers import NoRepeatNGramLogitsProcessor

    if not n:
        return []
    rule = NoRepeatNGramLogitsProcessor(n)
    return [lambda tokens, scores: rule(tokens[:, begin:], scores)]
