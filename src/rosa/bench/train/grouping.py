"""A Trainer that gives an adapter's factors parameter groups of their own.

DeepSpeed's ZeRO has one count of Adam's steps for all parameters of a group, so where a head is in
the factors' group a draw could not let theirs begin anew.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import Trainer


class GroupingTrainer(Trainer):
    """The Trainer; under DeepSpeed its optimizer has the factors in groups of their own."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled and isinstance(self.model, PeftModel):
            prefix = getattr(self.model.base_model, "prefix", None)
            named = self.model.named_parameters()
            _set_apart(optimizer, {p for name, p in named if prefix and prefix in name})
        return optimizer


def _set_apart(optimizer: Any, factors: set[Any]) -> None:
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if p in factors]
        rest = [p for p in group["params"] if p not in factors]
        if own and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": own})
