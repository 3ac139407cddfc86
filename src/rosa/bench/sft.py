"""TRL's SFTTrainer with the loss and the checkpoints of any other run.

It keeps no logits of all words, which are most of a chat model's memory, and takes several texts in
a row. Rows come to it as token ids with labels, of one length at most.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from rosa.bench.surviving import SurvivingTrainer
from rosa.errors import UserError, blame


class SurvivingSFTTrainer(SurvivingTrainer, SFTTrainer):  # type: ignore[misc]  # of two evaluate()
    """Whose loss is `MeanTrainer`'s: both come before TRL's trainer, and that before transformers'.

    Raises:
        ValueError: TRL does not compute this model's loss.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        with blame(f"TRL cannot train {name}", ValueError):
            super().__init__(model, *args, **kwargs)
        for parameter, before in trained:  # on quantized weights TRL rounds them to bfloat16
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        if not _computes_the_loss(self.model):
            raise UserError(
                f"TRL computes another loss than {name} does, whose head is not one layer: train "
                "it on rows of text, or of prompt and completion, without --packing"
            )

    def no_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """Zero, which TRL's loss over no items is."""
        return SFTTrainer.compute_loss(self, model, inputs) * 0.0


def _computes_the_loss(model: Any) -> bool:
    """Whether TRL's loss, from the last hidden states and the head's weight, is the model's own."""
    training, device = model.training, next(model.parameters()).device
    ids = torch.arange(4, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        model.eval()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        own, found = (model(**batch, **how).loss.float() for how in ({}, _FUSED))
    model.train(training)
    return not own.isfinite() or torch.allclose(found, own, rtol=0.03, atol=0.03)


_FUSED = {"fused_lm_head": True}


def arguments(packing: bool, **given: Any) -> SFTConfig:
    """The Trainer's arguments, for rows that are ready as they are."""
    ready = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(gradient_checkpointing=False, padding_free=packing, **ready, **given)


def collator(tokenizer: Any, packing: bool) -> Any:
    """What makes a batch of the rows, as the trainer does."""
    return DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=packing)
