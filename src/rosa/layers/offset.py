"""The offsets of a layer: what each adapter has done to its weight beyond its current factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank

_PARTS = ("A", "B", "draws")


@dataclass
class Offset:
    """What one adapter has done to the weight beyond its current factors."""

    terms: LowRank  # the offset O
    draws: int = 0  # subspaces drawn so far: the whole random state
    in_weight: LowRank | None = None  # what of this adapter stands in the weight in memory
    merged: bool = False  # whether that is the whole change O + s B A, not just O


class OffsetDict(nn.Module):
    """The offsets of a layer by adapter name: in its state dict, but neither parameter nor buffer.

    They are needed only when the weight is touched. So they stay in main memory when the model is
    moved, keep their precision when it is cast, and are not broadcast by data-parallel wrappers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, Offset] = {}
        self._pieces: dict[str, dict[str, Tensor]] = {}  # of offsets that state dicts bring in part

    def __getitem__(self, adapter: str) -> Offset:
        return self.entries[adapter]

    def __setitem__(self, adapter: str, entry: Offset) -> None:
        self.entries[adapter] = entry

    def __delitem__(self, adapter: str) -> None:
        del self.entries[adapter]
        self._pieces.pop(adapter, None)

    def __contains__(self, adapter: object) -> bool:
        return adapter in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("entries", ()):
            # Where transformers' own loading of an adapter's folder looks for a place to put O.
            raise NotImplementedError(
                "a ROSA adapter is loaded by PEFT: PeftModel.from_pretrained(base_model, folder) "
                "or peft.AutoPeftModelFor...; transformers' own loading cannot place its offsets"
            )
        return super().__getattr__(name)

    def keys(self) -> list[str]:
        """The names of the adapters."""
        return list(self.entries)

    def extra_repr(self) -> str:
        """The adapters and the rank of their offsets."""
        return ", ".join(f"{name}: rank {e.terms.rank}" for name, e in self.entries.items())

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for adapter, entry in self.entries.items():
            key = f"{prefix}{adapter}."
            destination[f"{key}A"] = entry.terms.A
            destination[f"{key}B"] = entry.terms.B
            destination[f"{key}draws"] = torch.tensor(entry.draws)
            # Only of use beside the base weight, to know what of the adapter is in it.
            mark = 0 if entry.in_weight is None else 2 if entry.merged else 1
            destination[f"{key}in_weight"] = torch.tensor(mark)

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
        for adapter, entry in self.entries.items():
            key = f"{prefix}{adapter}."
            there = {name for name in _PARTS if f"{key}{name}" in state_dict}
            missing_keys.extend(f"{key}{name}" for name in _PARTS if name not in there)
            pieces = self._pieces.setdefault(adapter, {})
            pieces.update({name: state_dict[f"{key}{name}"].detach().cpu() for name in there})
            if len(pieces) < len(_PARTS):
                continue
            a, b, draws = (pieces[name] for name in _PARTS)
            del self._pieces[adapter]
            like = entry.terms
            if a.shape[1] != like.A.shape[1] or b.shape[0] != like.B.shape[0]:
                error_msgs.append(
                    f"{key}: the offset in the file is for a weight of shape "
                    f"({b.shape[0]}, {a.shape[1]}), the layer's is "
                    f"({like.B.shape[0]}, {like.A.shape[1]})"
                )
                continue
            entry.terms = LowRank(b.to(like.B.dtype).clone(), a.to(like.A.dtype).clone())
            entry.draws = int(draws)
