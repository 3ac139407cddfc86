"""A Trainer whose loss is the mean over a step's items, however the step is split into batches.

An item is an example, or for a language model a token that is learned. Transformers' Trainer takes
a model whose forward pass has `**kwargs` for one that divides its loss by the number of items when
it is told it. Classifiers and regressions are not, so their loss came out too large, by as many
times as there are batches in a step, or processes; and some decoders are told a wrong number.
Here no model is told. Each gives the mean over its batch, as all models do, and a batch counts by
its items. The loss of an evaluation is the mean over all items as well.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_leaves

from rosa.bench.train.grouping import GroupingTrainer
from rosa.errors import UserError

Batch = Mapping[str, Any]
WEIGHT = "weight_of_the_batch"
"""In a batch that is trained: what its mean loss is to be multiplied by."""
MOST_SKIPPED = 10
"""Steps in a row that are left out before a training has diverged all the same."""


def item_counter(kind: str, model: Any) -> Callable[[Batch], int]:
    """How many items the model's loss on a batch is the mean of, by the kind of the task.

    A decoder predicts each token from those before it, so none predicts a row's first, unless
    PEFT puts tokens of its own before it.
    """
    if kind == "preference":
        return lambda batch: len(batch["input_ids"]) // 2
    if kind != "language":
        return lambda batch: len(batch["labels"])
    config = getattr(model, "active_peft_config", None)
    prompt = config is not None and config.is_prompt_learning and config.peft_type
    first = 0 if prompt and prompt != "PREFIX_TUNING" else 1
    return lambda batch: int((batch["labels"][..., first:] != -100).sum())


class MeanTrainer(GroupingTrainer):
    """The Trainer, with losses as this module's docstring says.

    Attributes:
        not_of_the_model: what of a batch the model's forward pass is not given.

    Args:
        args: the Trainer's.
        count: `item_counter`'s.
        skips: leave out a step whose gradient is NaN or infinite, in place of an error.
        kwargs: the Trainer's.
    """

    not_of_the_model: tuple[str, ...] = (WEIGHT,)

    def __init__(
        self, *args: Any, count: Callable[[Batch], int], skips: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.count, self.skips = count, skips
        self._skipped = 0  # steps in a row
        self.model_accepts_loss_kwargs = False  # the model is to give its batch's mean
        self._evaluated = (0.0, 0)  # this process's sum of losses, and its items

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """A step's batches, each with the factor that makes their mean one over the items."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [self._own_rows(batch) for batch in batches[-1:]]
        last = zip(batches[-1:], rows, strict=True)
        own = [*batches[:-1], *(self.first_rows(batch, n) for batch, n in last)]
        items = [self.count(batch) for batch in own]
        total = sum(gather_object([sum(items)]))
        # The Trainer divides by the number of batches, and processes average their gradients.
        factor = len(batches) * self.accelerator.num_processes / max(total, 1)
        # A process that has no rows left takes part in the step all the same, with one that
        # counts nothing.
        kept = [
            b if n else self.first_rows(a, 1) for a, b, n in zip(batches, own, items, strict=True)
        ]
        return [{**b, WEIGHT: n * factor} for b, n in zip(kept, items, strict=True)], None

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's mean loss; in training, times its factor."""
        weight = inputs.pop(WEIGHT, None)
        if weight == 0:  # the mean over no items is no number
            return self.no_loss(model, inputs)
        # Outputs only where they are wanted: TRL's trainer runs the model once more for them.
        found: Any = super().compute_loss(model, inputs, return_outputs=return_outputs)
        loss, *outputs = found if return_outputs else (found,)
        loss = loss if weight is None else loss * weight
        return (loss, *outputs) if return_outputs else loss

    def no_loss(self, model: Any, inputs: Any) -> Tensor:
        """Zero, of a batch that counts nothing, through all of the model."""
        outputs: Any
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return outputs["logits"].sum() * 0.0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; stops a training that has diverged, which the Trainer would hide."""
        kept = dict(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self.skips and not math.isfinite(float(loss)):
            where = ""
            if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
                # Where weights are in parts, a pass needs all processes there.
                given = {n: v for n, v in kept.items() if n not in self.not_of_the_model}
                found = first_not_finite(self.model, self._prepare_inputs(given))  # type: ignore[arg-type]
                where = f", first {found}"
            raise UserError(
                f"the training loss became {float(loss)} in step {self.state.global_step + 1}"
                f"{where}: {self._way_out}"
            )
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """As the Trainer's, once a step's gradients are there; NaN and infinity go no further.

        DeepSpeed has made the step by then; it goes into no checkpoint.
        """
        if self.is_deepspeed_enabled:
            norm: Any = super()._clip_grad_norm(model)
            if norm is not None and not math.isfinite(float(norm)):
                step = self.state.global_step + 1
                raise UserError(
                    f"the gradient became NaN or infinite in step {step}: {self._way_out}"
                )
            return norm
        optimizer: Any = self.optimizer  # to look for them in the model takes a while
        trained = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = get_total_norm([p.grad for p in trained])
        if self.is_fsdp_enabled:
            norm = norm.full_tensor()
        if math.isfinite(float(norm)):
            self._skipped = 0
            clip_grads_with_norm_(trained, self.args.max_grad_norm, norm)
            return norm
        found = [name for name, p in model.named_parameters() if not _is_finite(p.grad)]
        what = (
            f"the gradient became NaN or infinite in step {self.state.global_step + 1}, in "
            f"{len(found)} weights such as {', '.join(found[:2])}"
        )
        self._skipped += 1
        if not self.skips:
            raise UserError(f"{what}: {self._way_out}")
        if self._skipped > MOST_SKIPPED:
            raise UserError(f"{what}, and so for {MOST_SKIPPED} steps before it: {self._way_out}")
        warnings.warn(f"{what}: the step is skipped", stacklevel=2)
        model.zero_grad(set_to_none=True)  # the optimizer passes over what has none
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        """None: to count them takes a look at all modules in each step, and nothing reads them."""
        return 0

    @property
    def _way_out(self) -> str:
        way_out = (
            f"the training has diverged, or a text or weight is damaged. Lower --lr (it is "
            f"{self.args.learning_rate:g}), or go on from the last checkpoint by --resume"
        )
        if self.is_deepspeed_enabled:
            return way_out
        return f"{way_out}, or leave such steps out by --on-nan skip"

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's, with the loss as the mean over all items."""
        self._evaluated = (0.0, 0)
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        losses, items = zip(*gather_object([self._evaluated]), strict=True)
        if sum(items):
            output.metrics[f"{metric_key_prefix}_loss"] = sum(losses) / sum(items)
        return output

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As the Trainer's; keeps the loss of the rows that are this process's own."""
        rows = self._own_rows(inputs)
        own = self.first_rows(inputs, rows or 1)
        if prediction_loss_only:
            inputs = own
        # As many passes in every process: TRL's trainer gathers in each, ZeRO 3 the weights.
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        items, loss = self.count(own) if rows else 0, found[0]
        if self._rows_left() and not prediction_loss_only:
            loss = super().prediction_step(model, own, True, ignore_keys)[0]
        if items:
            mean = float(loss)  # type: ignore[arg-type]  # there are labels, so there is a loss
            if not math.isfinite(mean):
                raise UserError(
                    f"the loss on the evaluation's data is {mean}: the model's weights have "
                    "diverged, or are damaged. After training, lower --lr"
                )
            seen, before = self._evaluated
            self._evaluated = (seen + mean * items, before + items)
        return found

    def _own_rows(self, batch: Batch) -> int:
        """How many rows of a batch count: accelerate fills the last ones up by repeating rows."""
        rows, left = self.rows_of(batch), self._rows_left()
        return min(max(left - self.accelerator.process_index * rows, 0), rows) if left else rows

    def _rows_left(self) -> int:
        """How many rows of the processes' last batch count, if not all do; else 0."""
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader:
            return 0
        if state.remainder >= 0:
            return state.remainder
        # Accelerate knows it of no epoch that is gone on with in its middle.
        return len(self.train_dataset) % (self.args.train_batch_size * processes)  # type: ignore[arg-type]

    def rows_of(self, batch: Batch) -> int:
        """How many rows of the data a batch has."""
        return len(batch["labels"])

    def first_rows(self, batch: Batch, rows: int) -> dict[str, Any]:
        """A batch's first so many rows."""
        if rows == self.rows_of(batch):  # also one row of several texts, whose ends are no rows
            return dict(batch)
        return {name: values[:rows] for name, values in batch.items()}


def first_not_finite(model: nn.Module, inputs: Batch) -> str:
    """Where a forward pass first gives NaN or infinity, in words."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if not found and not all(map(_is_finite, tensors)):
            found.append(f"in the output of {name}")

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "in the loss itself"


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all())
