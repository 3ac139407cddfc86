"""How many tokens a model can read at once."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# What configurations call the most positions, where no table of them says it.
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions")
_FEW = 3


def longest_input(model: Any) -> int | None:
    """The most tokens that a model reads at once; None if it has no limit, or says none.

    The size of a table of position embeddings is no answer: in RoBERTa's the first positions are
    left out, in OPT's others are added. So a few tokens are given to the model, and the rows that
    it looks up tell how many more it could. Where it looks none up (rotary or relative positions),
    its configuration says how long its texts were. A prompt that PEFT puts before a text takes
    some of the places.
    """
    virtual = 0
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        virtual = config.num_virtual_tokens if config.is_prompt_learning else 0  # type: ignore[attr-defined]
        model = model.get_base_model()
    limits = _limits_of_tables(model) or _limits_of_config(model.config)
    return min(limits) - virtual if limits else None


def _limits_of_config(config: Any) -> list[int]:
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _NAMES]
    return [n for n in limits if isinstance(n, int) and n > 0][:1]  # XLNet's is -1: no limit


def _limits_of_tables(model: nn.Module) -> list[int]:
    """For each table that is looked up by position, how many tokens it has rows for."""
    # A copy of the modules, not of their weights: some change themselves by the length they see.
    tensors = chain(model.parameters(), model.buffers())
    probe = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    for module in probe.modules():
        if isinstance(module, nn.ModuleList):  # the layers: positions are looked up before them
            for layer in module:
                layer.register_forward_pre_hook(_stop)
    fewer, more = _rows_looked_up(probe, _FEW), _rows_looked_up(probe, _FEW + 1)
    return [
        _FEW + rows - 1 - last
        for table, (rows, last) in fewer.items()
        if more.get(table, (rows, last))[1] == last + 1
    ]


class _Enough(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _Enough


def _rows_looked_up(model: Any, length: int) -> dict[int, tuple[int, int]]:
    """For each table, its rows and the last that is looked up, when the model reads `length`."""
    padding = {getattr(module, "padding_idx", None) for module in model.modules()}
    padding.add(model.config.pad_token_id)
    token = next(i for i in range(len(padding) + 1) if i not in padding)
    ids = torch.full((1, length), token, device=next(model.parameters()).device)
    with torch.no_grad(), _Lookups() as lookups:
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except _Enough:
            pass
        except Exception:  # it wants other inputs, or another device: its configuration must do
            return {}
    return lookups.found


class _Lookups(TorchDispatchMode):
    """Notes which rows of which tables are looked up, a row for each place of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            table: Tensor = args[0]
            rows: Tensor = args[1]
            if rows.numel() == rows.shape[-1]:  # relative positions have a row for each pair
                self.found[table.data_ptr()] = len(table), int(rows.max())
        return func(*args, **(kwargs or {}))
