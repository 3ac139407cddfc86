"""A plain model with the adapter merged, of the base's own class.

What is written is loaded back as a user would, and compared, before it takes its place.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from rosa.errors import ExportError, UserError, is_out_of_memory
from rosa.export.lazily import Weights, merged_lazily
from rosa.export.staging import rosa_adapter, staged
from rosa.layers.in_model import rosa_layers

MAX_SHARD_SIZE = "5GB"
"""Of a file of the weights."""


def export_merged(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write the plain model with the adapter merged, of the base's own class and weight names.

    The model passed is left as it is. Transformers' models are written file by file, so this needs
    the memory of one file; others' that of the adapted weights. What was written is loaded back by
    the base's own class and compared, number by number.

    Args:
        model: a `PeftModel` with ROSA, wrapped or not.
        folder: where the model's files go.
        adapter_name: which adapter; the active one if None.
        max_shard_size: of a file, as in transformers' `save_pretrained`.

    Raises:
        ValueError: the adapter is not ROSA's, or does not exist; `folder` has a model already.
        ExportError: something else is loaded from it; then nothing is left in `folder`.
    """
    model, adapter = rosa_adapter(model, adapter_name)
    with staged(folder) as place:
        write_merged(model, adapter, place, max_shard_size)


def write_merged(
    model: PeftModel, adapter: str, folder: Path, max_shard_size: str = MAX_SHARD_SIZE
) -> Any:
    """Write the merged model; raise ExportError if another is loaded from it, else return that.

    A model that has no `save_pretrained` is written as a state dict, and None is returned.
    """
    if quantized := [layer.name for _, layer in rosa_layers(model) if layer.is_quantized]:
        raise UserError(
            f"{quantized[0]} is quantized, and merging into it would round what was learned: load "
            "the adapter onto the model as it was before (PeftModel.from_pretrained of the whole "
            "model), and export that; or take the rounded one by model.merge_and_unload()"
        )
    return write_plain(*merged_lazily(model, adapter), folder, max_shard_size)


def write_plain(
    plain: Any, weights: Weights, folder: Path, max_shard_size: str = MAX_SHARD_SIZE
) -> Any:
    """Write a plain model whose weights are computed as they are written; see `write_merged`.

    Args:
        plain: the model.
        weights: what its weights are that are on the meta device.
        folder: where its files go.
        max_shard_size: of a file.
    """
    served = _Served(weights)
    lazily = isinstance(plain, PreTrainedModel)
    if not lazily:
        for name, tensor in served.items():
            _set(plain, name, tensor)
    state = plain.state_dict()
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    if lazily and len(tensors) < len(state):
        others = [name for name, value in state.items() if not isinstance(value, Tensor)]
        raise UserError(
            f"{', '.join(others[:5])}: an extra state that is no tensor, which transformers' "
            "save_pretrained cannot write; nothing was written. Use model.merge_and_unload(), and "
            "save the plain model's state dict"
        )
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if not hasattr(plain, "save_pretrained"):
        path = folder / "pytorch_model.bin"
        torch.save(state, path)
        # Ours, so that a module's extra state may be of any class.
        _check_merged(served.digests_of(state), torch.load(path, "cpu", weights_only=False))
        return None
    kind: Any = type(plain)
    how: dict[str, Any] = {}
    if lazily:
        if weights:  # as transformers writes a model that is offloaded
            vars(plain).update(
                hf_device_map={"": "disk"}, _hf_hook=SimpleNamespace(weights_map=served)
            )
        how["max_shard_size"] = max_shard_size
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            plain.save_pretrained(str(folder), **how)
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        # Such as generation settings that do not go together, weights tied without its knowing.
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{kind.__name__}.save_pretrained refuses this model; nothing was written: {error}"
        ) from error
    how = {}
    if lazily and dtypes:
        how["dtype"] = functools.reduce(torch.promote_types, dtypes)  # so that none is rounded
    attention = getattr(getattr(plain, "config", None), "_attn_implementation", None)
    if lazily and attention:
        how["attn_implementation"] = attention
    expected = served.digests_of(state)
    del plain, state, tensors  # no three models in memory at a time
    try:
        loaded = kind.from_pretrained(str(folder), **how)
    except Exception as error:
        raise ExportError(
            f"{kind.__name__}.from_pretrained cannot load what its save_pretrained wrote: "
            f"{type(error).__name__}: {error}. Nothing was written: use model.merge_and_unload(), "
            "and save the plain model in a way that its class can load"
        ) from error
    _check_merged(expected, loaded.state_dict())
    return loaded.eval()


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a weight into a model; not by a way that looks at the one that was there."""
    owner, _, own = name.rpartition(".")
    model.get_submodule(owner)._parameters[own] = nn.Parameter(tensor)


Digest = tuple[torch.dtype | None, torch.Size, str]


class _Served(Mapping[str, Tensor]):
    """Weights by name, each computed when it is asked for; what it was is remembered."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._digests: dict[str, Digest] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]()
        self._digests[name] = _digest(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def digests_of(self, state: Mapping[str, Tensor]) -> dict[str, Digest]:
        """Of a state dict whose weights on the meta device are these, asked for or not.

        A weight that is tied to another one is not written by its own name.
        """
        for name, value in state.items():
            if name not in self._digests:
                on_meta = isinstance(value, Tensor) and value.is_meta
                self._digests[name] = _digest(self[name] if on_meta else value)
        return self._digests


def _digest(value: Any) -> Digest:
    """A tensor's dtype, shape, and a fingerprint of its numbers; or that of an extra state."""
    if not isinstance(value, Tensor):
        leaves, _ = tree_flatten(value)
        parts = [_digest(each) if isinstance(each, Tensor) else each for each in leaves]
        whole = b"".join(map(pickle.dumps, parts))
        return None, torch.Size(), hashlib.blake2b(whole).hexdigest()
    numbers = value.detach().cpu().to_dense().contiguous().reshape(-1).view(torch.uint8).numpy()
    return value.dtype, value.shape, hashlib.blake2b(numbers.data).hexdigest()


def _as(value: Any, dtype: torch.dtype | None) -> Any:
    return value if dtype is None or not isinstance(value, Tensor) else value.to(dtype)


def _check_merged(expected: dict[str, Digest], found: dict[str, Any]) -> None:
    differ = [
        name
        for name in sorted({*expected, *found})
        if name not in expected
        or name not in found
        # It may be loaded in a wider dtype, which holds the same numbers.
        or _digest(_as(found[name], expected[name][0])) != expected[name]
    ]
    if differ:
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ExportError(
            f"the merged model is not loaded as it was saved: {', '.join(differ[:5])}{more} "
            "differ. Nothing was written; this model's class does not give its own weights back: "
            "use model.merge_and_unload(), and save that in another way"
        )
