"""A folder to export into, and the adapter that is exported."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn

from rosa.config import RosaConfig
from rosa.errors import UserError, UserTypeError
from rosa.layers.in_model import layers_of
from rosa.pretrained.sharding import check_unsharded

# What a folder must not hold already: loading would take it for a part of the export.
_MODEL_FILES = re.compile(
    r"(adapter_config|config|generation_config)\.json"
    r"|(adapter_model|model|pytorch_model).*\.(safetensors|bin|json)"
)

_BEGUN = ".export-"
"""What the name of a folder begins with that an export writes in."""


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write in and to check; its files go into `folder` if nothing is raised.

    So a failed export leaves nothing, and what a user has in `folder` stays as it is. What an
    export left that was killed is deleted.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    taken = [name for name in contents(folder) if _MODEL_FILES.fullmatch(name)]
    if taken:
        raise UserError(
            f"{folder} holds a model or an adapter already ({', '.join(taken[:5])}), which the "
            "export would replace or be mixed with: name a new folder, or remove those first"
        )
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        # Inside, so that moving the files only renames them.
        with tempfile.TemporaryDirectory(prefix=f"{_prefix()}{os.getpid()}-", dir=folder) as place:
            yield Path(place)
            clashes = [p.name for p in Path(place).iterdir() if (folder / p.name).exists()]
            if clashes:
                raise UserError(
                    f"{folder} holds {', '.join(sorted(clashes))} already, which the export would "
                    "replace: name a new folder"
                )
            for path in sorted(Path(place).iterdir()):
                moved.append(folder / path.name)
                path.rename(folder / path.name)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in made:
            path.rmdir()
        raise


def contents(folder: Path) -> list[str]:
    """The names of what is in a folder, if there is one, but for what exports have begun.

    What one has left that was killed is deleted: one of this machine, whose process is no more.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if not path.name.startswith(_BEGUN):
            found.append(path.name)
        elif path.name.startswith(_prefix()):
            process = path.name.removeprefix(_prefix()).partition("-")[0]
            if process.isdecimal() and not psutil.pid_exists(int(process)):
                shutil.rmtree(path, ignore_errors=True)
    return found


def _prefix() -> str:
    return f"{_BEGUN}{socket.gethostname()}-"


def check_not_merged(model: PeftModel, adapter: str) -> None:
    """Raise UserError if nothing in a model is adapted any more."""
    if not layers_of(model, adapter):
        raise UserError(
            f"the model has no layer of adapter {adapter!r} any more, as after merge_and_unload or "
            "unload: load the adapter again to export it; export_merged writes a merged model"
        )


def rosa_adapter(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, str]:
    """The model without wrappers such as DDP's, and the name of a ROSA adapter of it."""
    inner: Any = model
    if isinstance(model, nn.Module):
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(inner, PeftModel):
        raise UserTypeError(f"expected a PeftModel with ROSA, got {type(inner).__name__}")
    check_unsharded(
        inner,
        "save the adapter (model.save_pretrained, in all processes), and export "
        "what one process loads from that",
    )
    active = inner.active_adapters
    if adapter_name is None and len(active) > 1:
        raise UserError(
            f"several adapters are active ({', '.join(active)}), and one is exported: name it by "
            "adapter_name, or make one of their sum first (model.add_weighted_adapter)"
        )
    adapter = active[0] if adapter_name is None else adapter_name
    if not isinstance(inner.peft_config.get(adapter), RosaConfig):
        rosa = [name for name, c in inner.peft_config.items() if isinstance(c, RosaConfig)]
        there = f"; there are: {rosa}" if rosa else ": merged into a plain model it can be"
        raise UserError(f"{adapter!r} is not a ROSA adapter of this model{there}")
    return inner, adapter
