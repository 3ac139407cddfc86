"""The offsets of a layer, as a module that state dicts hold."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank
from rosa.layers.adapter import Adapter
from rosa.pretrained.sharding import is_dtensor, own_part
from rosa.pretrained.weight import BaseWeight

BESIDE_LIVE_FACTORS = "_beside_live_factors"
"""An attribute of the count of draws in a state dict whose factors are the model's own memory."""
PARTS = ("A", "B", "draws")
"""What a state dict holds of an offset."""
MARK = "in_weight"
"""And beside it, what of its adapter is in the base weight there."""
WEIGHT = "weight"
_STANDS_IN = "_stands_in"
"""An attribute of a tensor that a loader may put another in the place of."""


def drop_stand_ins(state_dict: dict[str, Any], prefix: str, adapter: str) -> None:
    """Take out of a state dict what has the place of an offset that it does not hold."""
    for part in (*PARTS, MARK):
        key = f"{prefix}rosa_offset.{adapter}.{part}"
        if hasattr(state_dict.get(key), _STANDS_IN):
            del state_dict[key]


def count(tensor: Tensor) -> int:
    """How often a tensor, or the part of it that is here, was written to."""
    return own_part(tensor)._version


class OffsetDict(nn.Module):
    """The offsets of a layer by adapter name: in its state dict, but neither parameter nor buffer.

    They are needed only when the weight is touched. So they stay in main memory when the model is
    moved, keep their precision when it is cast, and are not broadcast by data-parallel wrappers.

    Args:
        adapters: the layer's, by name; PEFT's deletion takes them out here.
        weight: the layer's.

    Attributes:
        counted: of a layer in shards, how often each parameter of `there` had been written to when
            a loader looked for places.
    """

    def __init__(self, adapters: dict[str, Adapter], weight: BaseWeight) -> None:
        super().__init__()
        self.adapters = adapters
        self.counted: dict[str, int] = {}
        self._weight = weight
        self._pieces: dict[str, dict[str, Tensor]] = {}  # of offsets that state dicts bring in part

    def __delitem__(self, adapter: str) -> None:
        del self.adapters[adapter]
        self._pieces.pop(adapter, None)

    def __contains__(self, adapter: object) -> bool:
        return adapter in self.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("adapters", ()):
            # Where accelerate's load_checkpoint_in_model looks for a place to put O.
            raise NotImplementedError(
                "this loader places parameters by their names, and ROSA's offsets are none: load "
                "an adapter by PeftModel.from_pretrained(base_model, folder), or a state dict by "
                "model.load_state_dict"
            )
        return super().__getattr__(name)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For `torch.distributed.checkpoint`, which looks for each name of a state dict: where."""
        return dict.fromkeys(self.adapters, "_named")

    @property
    def _named(self) -> SimpleNamespace:
        """An object with the names that the state dict has here, and nothing behind them."""
        names = SimpleNamespace(**dict.fromkeys((*PARTS, MARK)))
        return SimpleNamespace(**dict.fromkeys(self.adapters, names))

    def named_buffers(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        """None; of a layer in shards a stand-in for each tensor that the state dict has here.

        `torch.distributed.checkpoint` asks for them before it sends a state dict from one process
        to the others: each takes what it finds a place for, and reads no more of that than the
        name. It writes into the parameters, and then hands on all that there are.
        """
        there = self.there()
        if not any(map(is_dtensor, there.values())):
            return
        self.counted = {key: count(parameter) for key, parameter in there.items()}
        for name in self.adapters:
            for part in (*PARTS, MARK):
                stand_in = torch.empty(())
                setattr(stand_in, _STANDS_IN, True)
                yield f"{name}.{part}", stand_in

    def there(self) -> dict[str, Tensor]:
        """The layer's parameters: its weight (under WEIGHT), and the factors by their keys."""
        found = {WEIGHT: self._weight.parameter}
        for name, adapter in self.adapters.items():
            found |= dict(zip((f"rosa_A.{name}", f"rosa_B.{name}"), adapter.factors, strict=True))
        return found

    def keys(self) -> list[str]:
        """The names of the adapters."""
        return list(self.adapters)

    def extra_repr(self) -> str:
        """The adapters and the rank of their offsets."""
        return ", ".join(f"{name}: rank {a.terms.rank}" for name, a in self.adapters.items())

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, adapter in self.adapters.items():
            key = f"{prefix}{name}."
            terms = LowRank(
                adapter.terms.B.clone(), adapter.terms.A.clone()
            )  # loaders write into it
            destination[f"{key}A"], destination[f"{key}B"] = terms.A, terms.B
            destination[f"{key}draws"] = draws = torch.tensor(adapter.draws)
            setattr(draws, BESIDE_LIVE_FACTORS, True)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, adapter in self.adapters.items():
            key = f"{prefix}{name}."
            there = {part for part in PARTS if f"{key}{part}" in state_dict}
            missing_keys.extend(f"{key}{part}" for part in PARTS if part not in there)
            pieces = self._pieces.setdefault(name, {})
            pieces.update({part: state_dict[f"{key}{part}"].detach().cpu() for part in there})
            if len(pieces) < len(PARTS):
                continue
            a, b, draws = (pieces[part] for part in PARTS)
            del self._pieces[name]
            found = (*b.shape[:-1], a.shape[-1])
            if found != adapter.shape:
                error_msgs.append(
                    f"{key}: the offset in the file is for a weight of shape {found}, the layer's "
                    f"is {adapter.shape}"
                )
                continue
            dtype = adapter.terms.dtype
            adapter.terms = LowRank(b.to(dtype).clone(), a.to(dtype).clone())
            adapter.draws = int(draws)
