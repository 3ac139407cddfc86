"""What training does to the weights: the rank and the spectrum of the change, as it goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from rosa import RosaLayer

MOST_LAYERS = 12  # recorded, spread evenly over the model: an SVD of each at every evaluation
TOLERANCE = 1e-4  # singular values below this share of the largest do not count for the rank


class ChangeRecorder(TrainerCallback):
    """Records the rank of each weight's change at every evaluation, and spectra at the end.

    Args:
        model: the pretrained model, before any adapter: copies of the recorded weights are kept.
        names: the layers to record, of which at most `MOST_LAYERS` are.

    Attributes:
        epochs: a record per evaluation: `epoch`, `step`, and the numerical `ranks` by layer.
        spectra: by layer the singular values, largest first, of the pretrained `weight` and of
            its `change`.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        stride = -(-len(names) // MOST_LAYERS) or 1
        self._before = {n: _plain_weight(model.get_submodule(n)).clone() for n in names[::stride]}
        self.epochs: list[dict[str, Any]] = []
        self.spectra: dict[str, dict[str, list[float]]] = {}
        self._ended = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the ranks."""
        if self._ended:  # the best model is evaluated again, and on other data
            return
        found = self._singular_values(kwargs["model"])
        ranks = {n: int((s > TOLERANCE * s[0]).sum()) if s[0] else 0 for n, s in found.items()}
        # The Trainer's log is in its checkpoints: a run that is resumed knows of the epochs before.
        log: list[dict[str, Any]] = state.log_history  # type: ignore[assignment]  # of floats, it says
        log.append({"epoch": state.epoch, "step": state.global_step, "ranks": ranks})
        seen = [row for row in log if "ranks" in row]
        self.epochs = [{name: row[name] for name in ("epoch", "step", "ranks")} for row in seen]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the spectra."""
        self._ended = True
        changes = self._singular_values(kwargs["model"])
        self.spectra = {
            name: {
                "weight": torch.linalg.svdvals(weight).tolist(),
                "change": changes[name].tolist(),
            }
            for name, weight in self._before.items()
        }

    @torch.no_grad()
    def _singular_values(self, model: nn.Module) -> dict[str, Tensor]:
        prefix = "base_model.model." if hasattr(model, "peft_config") else ""
        return {
            name: torch.linalg.svdvals(_change(model.get_submodule(prefix + name), before))
            for name, before in self._before.items()
        }


def _plain_weight(module: nn.Module) -> Tensor:
    """A linear layer's weight as (out, in) in float32."""
    weight = module.weight.detach().float()  # type: ignore[union-attr]
    return weight.T if isinstance(module, Conv1D) else weight


def _change(module: nn.Module, before: Tensor) -> Tensor:
    """What the module's effective weight (out, in) differs by from what it was."""
    if isinstance(module, RosaLayer):  # known exactly
        return module.whole_change(module.active_adapters[0]).dense().float().to(before.device)
    if isinstance(module, BaseTunerLayer):
        module = copy.deepcopy(module)  # merging and unmerging would round the weight
        module.merge()
        module = module.get_base_layer()
    return _plain_weight(module) - before
