"""A run's checkpoints: each is whole, and shown to be, or is not gone on from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

WHOLE, BEGUN, STATE = "whole.json", "begun", "trainer_state.json"
"""In a checkpoint: the digests of its files, once all are there; a mark, until they are; and what
the Trainer keeps of itself."""
KEPT = 2


def begin(checkpoint: Path) -> None:
    """Mark a checkpoint's folder as not whole, before anything is written there."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / WHOLE).unlink(missing_ok=True)
    (checkpoint / BEGUN).touch()


def finish(checkpoint: Path, best: str | None) -> None:
    """Bring a checkpoint to the disk, mark it as whole, and only then delete older ones.

    Args:
        checkpoint: its folder.
        best: the checkpoint of the best model so far, which is kept too.
    """
    digests = {str(p.relative_to(checkpoint)): digest_of(p) for p in _files(checkpoint)}
    write_whole(checkpoint / WHOLE, json.dumps(digests, indent=2, sort_keys=True))
    (checkpoint / BEGUN).unlink()
    bring_to_disk(checkpoint)
    # By their steps: the time of a folder that was half deleted is the newest.
    rotate_checkpoints(str(checkpoint.parent), KEPT, best, use_mtime=False)


def give_up(checkpoint: Path) -> None:
    """Delete what was written of a checkpoint that is not whole."""
    if (checkpoint / BEGUN).exists() or not (checkpoint / STATE).is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)


def settle(folder: Path) -> Path | None:
    """The newest whole checkpoint of those in a folder, from which parts of others are removed.

    One that is marked as whole and has changed since is left there and passed over, with a warning.
    """
    found = []
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        give_up(checkpoint)
        step = checkpoint.name.rpartition("-")[2]
        if checkpoint.exists() and step.isdigit():
            found.append((int(step), checkpoint))
    for _, checkpoint in sorted(found, reverse=True):
        damaged = _damaged(checkpoint)
        if not damaged:
            return checkpoint
        warnings.warn(
            f"{checkpoint} is damaged ({', '.join(damaged)}): it is passed over for an older one",
            stacklevel=2,
        )
    return None


def _damaged(checkpoint: Path) -> list[str]:
    """Names of a checkpoint's files that are not what was written; none of one without digests."""
    if not (checkpoint / WHOLE).is_file():  # of a version that wrote none
        return []
    try:
        digests = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        return [
            name
            for name, digest in digests.items()
            if not (checkpoint / name).is_file() or digest_of(checkpoint / name) != digest
        ]
    except (ValueError, AttributeError):
        return [WHOLE]


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (BEGUN, WHOLE)]


def digest_of(path: Path) -> str:
    """Of a file's bytes, which are not read at once."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, and bring it to the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def bring_to_disk(folder: Path) -> None:
    """Return once all files in a folder are on the disk: a machine may stop at any time."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
