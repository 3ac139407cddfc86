"""TRL's SFTTrainer and DPOTrainer with the loss and the checkpoints of any other run.

They keep no logits of all words, which are most of a chat model's memory; the first takes several
texts in a row. Rows come to them as token ids, of one length at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from rosa.bench.train.averaging import WEIGHT
from rosa.bench.train.surviving import SurvivingTrainer
from rosa.errors import UserError, blame

_FUSED = {"fused_lm_head": True}


class _TrlTrainer(SurvivingTrainer):
    """Comes before TRL's trainer, and that before transformers'.

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
        with blame(f"TRL cannot train {name} so", AttributeError):  # a head in a wrapper of PEFT's
            computes = self._computes_the_loss()
        if not computes:
            raise UserError(
                f"TRL computes another loss than {name} does, whose head is not one layer: train "
                "it on rows of text, or of prompt and completion, without --packing"
            )

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Not TRL's, which knows the checkpoints' folder alone: the run writes its own."""

    def _computes_the_loss(self) -> bool:
        """Whether TRL's loss, from the last hidden states and the head's weight, is the model's."""
        with _not_in_parts_yet(self.args), _evaluating(self.model) as model:
            batch = _words(model)
            own, found = model(**batch), model(**batch, **_FUSED)
        loss = own.loss.float()
        fused = found.loss if found.loss is not None else -found.log_probs.mean()
        return not loss.isfinite() or torch.allclose(fused.float(), loss, rtol=0.03, atol=0.03)


class SurvivingSFTTrainer(_TrlTrainer, SFTTrainer):  # type: ignore[misc]  # of two evaluate()
    """Of texts and chats."""

    def no_loss(self, model: Any, inputs: Any) -> Tensor:
        """Zero, which TRL's loss over no items is."""
        return SFTTrainer.compute_loss(self, model, inputs) * 0.0


class SurvivingDPOTrainer(_TrlTrainer, DPOTrainer):  # type: ignore[misc]  # of two evaluate()
    """Of preferences; an item is a row, with both its answers.

    The reference is the model with its adapter disabled.

    Raises:
        ValueError: that is not what the training begins with, as for PiSSA, whose factors hold a
            part of the weight.
    """

    not_of_the_model = (*SurvivingTrainer.not_of_the_model, "completion_mask")

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        adapted = isinstance(model, PeftModel)
        if adapted and not _begins_as_disabled(model):
            raise UserError(
                "DPO holds a model to what it was, which this method's adapter, disabled, does not "
                "give back: choose one that begins at the pretrained model, such as rosa or lora"
            )
        super().__init__(model, *args, **kwargs)
        self._rewarded = (0.0, 0)  # sum of accuracies, and rows
        self._counts = True  # whether the rows of a batch of this process are evaluated
        if adapted:  # TRL has put a copy beside it
            self.model.delete_adapter("ref")  # type: ignore[union-attr,operator]

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The rows, which are token ids already."""
        return dataset

    def rows_of(self, batch: Mapping[str, Any]) -> int:
        """Half of what the model is given: the chosen answers come first, then the rejected."""
        return len(batch["input_ids"]) // 2

    def first_rows(self, batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """A batch's first so many rows, with both answers."""
        half = self.rows_of(batch)
        return {
            name: torch.cat([values[:rows], values[half : half + rows]])
            for name, values in batch.items()
        }

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; a batch may have fewer rows than another process's, or none that count."""
        counts = self._counts and inputs.get(WEIGHT) != 0
        with _gathering_any_number(self.accelerator, counts):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def no_loss(self, model: Any, inputs: Any) -> Tensor:
        """Zero, through all of the model."""
        return DPOTrainer.compute_loss(self, model, inputs) * 0.0

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """With the share of rows whose chosen answer gained more than the rejected one."""
        self._rewarded = (0.0, 0)
        output = super().evaluation_loop(*args, **kwargs)
        total, rows = self._rewarded
        prefix = kwargs.get("metric_key_prefix", "eval")
        if rows:
            output.metrics[f"{prefix}_accuracy"] = total / rows
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Keeps what TRL has found of the batch, which it averages over batches of any size."""
        own = self._own_rows(inputs)
        self._counts = own > 0
        try:
            found = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._counts = True
        rows = sum(gather_object([own]))
        total, before = self._rewarded
        accuracy = self._metrics["eval"]["rewards/accuracies"][-1]
        self._rewarded = (total + accuracy * rows, before + rows)
        return found


@contextmanager
def _not_in_parts_yet(args: Any) -> Iterator[None]:
    """While TRL takes the weights for whole, as they are before ZeRO 3 has them."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


@contextmanager
def _gathering_any_number(accelerator: Any, counts: bool) -> Iterator[None]:
    """While what TRL gathers for its metrics may be of unlike length over the processes.

    Args:
        accelerator: whose `gather` wants it alike.
        counts: whether this process has anything to give.
    """

    def gather(tensor: Tensor) -> Tensor:
        own = tensor.detach().cpu().reshape(-1)
        return torch.cat(gather_object([own if counts else own[:0]]))

    accelerator.gather = gather
    try:
        yield
    finally:
        del accelerator.gather


@contextmanager
def _evaluating(model: Any) -> Iterator[Any]:
    """The model in eval mode, without gradients; as it was afterwards."""
    training = model.training
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        model.train(training)


def _words(model: Any) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device)[None] % model.config.get_text_config().vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _begins_as_disabled(model: Any) -> bool:
    with _evaluating(model):
        begins = model(**_words(model)).logits
        with model.disable_adapter():
            disabled = model(**_words(model)).logits
    alike = begins.shape == disabled.shape  # not where tokens are put before the text
    return alike and torch.allclose(begins, disabled, rtol=1e-3, atol=1e-3)


def sft_arguments(packing: bool, **given: Any) -> SFTConfig:
    """The Trainer's arguments, for rows that are ready as they are."""
    ready = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(padding_free=packing, **ready, **given)


def dpo_arguments(beta: float, **given: Any) -> DPOConfig:
    """The Trainer's arguments, for rows that are ready as they are."""
    return DPOConfig(beta=beta, max_length=None, **given)


def sft_collator(tokenizer: Any, packing: bool) -> Any:
    """What makes a batch of the rows, as the trainer does."""
    return DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=packing)
