"""What a run leaves behind: its folder.

<output>/settings.json   every setting, and the versions of the libraries
<output>/adapter/        the adapter with its tokenizer (for `full` and `head`: model/)
<output>/history.json    losses by step, metrics by epoch
<output>/predictions.json  what a decoder wrote on the test set, where the task asks for it
<output>/metrics.json    the result; written last and whole, so it marks a finished run
<output>/checkpoints/    what --resume goes on from
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage.checkpoints import write_whole
from rosa.errors import UserError, shown

SETTINGS, METRICS, HISTORY = "settings.json", "metrics.json", "history.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
COMPARISON = "comparison.json"  # of a folder of many runs
PREDICTIONS = "predictions.json"
_OURS = (METRICS, HISTORY, PREDICTIONS, ADAPTER, MODEL, CHECKPOINTS)
DEFAULTS = {
    f.name: list(f.default) if isinstance(f.default, tuple) else f.default
    for f in fields(RunSettings)
    if f.default is not MISSING
}
"""What a setting is in a file of a version that did not have it yet."""
LOCK, _DIGEST = ".lock", "data_digest"
_SPLIT = ("batch_size", "gradient_accumulation", "processes")
"""How a step's rows are split, as their product is kept: a run goes on with another split."""


@contextmanager
def alone_in(folder: Path, taken: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is made.

    Raises:
        UserError: one is there, with the message `taken`.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(taken) from None
    with lock:
        yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file if it is broken, or holds something else."""
    found = _read(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {shown(found)} instead of a JSON object: it is damaged")
    return found


def kept_step(output: Path) -> int | None:
    """The step whose model a run has kept; None of a run of before that was written down."""
    path = output / HISTORY
    return read_json(path).get("kept_step") if path.is_file() else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not valid JSON ({reason}): the file is damaged") from error


def is_done(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (folder / METRICS).is_file()


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder; empty if there is no run there."""
    if not (folder / SETTINGS).is_file():
        return {}
    found = _read(folder / SETTINGS)
    # Others write a settings.json too; ours names the version of this package.
    ours = isinstance(found, dict) and "rosa-finetune" in (found.get("versions") or {})
    return found if ours else {}


def is_begun(folder: Path) -> bool:
    """Whether a run or a comparison was begun in a folder: others have files of these names too."""
    with suppress(UserError):
        if settings_of(folder):
            return True
    with suppress(UserError, FileNotFoundError):
        return {"task", "model"} <= read_json(folder / COMPARISON).keys()
    return False


def run_of(place: Path) -> dict[str, Any]:
    """The settings of the run whose folder this is, or is in: its adapter's, or a checkpoint's."""
    found = settings_of(place)
    for folder in place.resolve().parents[:2]:
        with suppress(UserError):  # others have files of that name
            found = found or settings_of(folder)
    return found


def check_output(output: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Raise unless `output` can be the folder of a run with these settings; changes nothing.

    Raises:
        ValueError: the folder holds a run and neither `resume` nor `overwrite` is given, holds
            something else, or holds a run with other settings than those to resume.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder")
    before = settings_of(output)
    if not before and output.is_dir() and any(p.name != LOCK for p in output.iterdir()):
        raise UserError(f"{output} holds files that are not a run's: name a new folder")
    if before and resume:
        _check_same(output, {**DEFAULTS, **before}, settings)  # its version may have had fewer
    elif before and not overwrite:
        raise UserError(
            f"{output} already holds a run: --resume goes on with it, --overwrite starts again"
        )


def _check_same(output: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError where a run has other settings than it is to be gone on with.

    How a step's rows are split over processes and batches is free, where as many are in a step.
    """
    there, here = (_rows_of_a_step(each) for each in ({**settings, **before}, settings))
    # ZeRO's files are each process's own; LoRA-GA's base is changed by what the split rounds.
    is_bound = settings.get("zero") is not None or settings.get("method") == "lora_ga"
    free = ("output", "versions", *(_SPLIT if there == here and not is_bound else ()))
    if before.get("deepspeed") != settings.get("deepspeed"):
        free += ("zero",)  # said by its file
    differ = [
        f"{name} ({before[name]} there, {value} here)"
        for name, value in settings.items()
        if name not in free and before.get(name, value) != value
    ]
    if not differ:
        return
    said = [f"{output} holds a run with other settings: {'; '.join(differ)}."]
    if there != here:
        said.append(
            f"A step has {there} rows there and {here} here: --batch-size and "
            "--gradient-accumulation make as many in any number of processes."
        )
    if is_bound:
        said.append("How a step's rows are split is a part of them here.")
    said.append("Give the same settings to resume it, or --overwrite to start again")
    raise UserError(" ".join(said))


def _rows_of_a_step(settings: dict[str, Any]) -> int:
    return math.prod(settings.get(name, 1) for name in _SPLIT)


@contextmanager
def unless_it_fails(output: Path) -> Iterator[None]:
    """Let a run's folder be made, without anything in it; if this fails, it goes again."""
    made = [folder for folder in (output / CHECKPOINTS, output) if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def begin(
    output: Path, settings: dict[str, Any], digest: str, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Make `output` a run's folder, checked before, that no other process trains in meanwhile.

    Args:
        output: the folder.
        settings: the run's.
        digest: of what it trains on: a run must go on with the same.
        resume: the folder's run is gone on with.
        overwrite: delete what a run left there.

    Raises:
        UserError: another process trains there, or the run was begun on other data.
    """
    taken = (
        f"another process is training in {output}: wait for it or stop it, or name another folder"
    )
    with alone_in(output, taken):
        before = settings_of(output).get(_DIGEST, digest)
        if resume and before != digest:
            raise UserError(
                f"the training data is not what the run in {output} was begun on: give the same "
                "files to resume it, or --overwrite to start again"
            )
        if overwrite:  # the result first, so that what is left of it is no finished run
            for name in _OURS:
                path = output / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        write_json(output / SETTINGS, {**settings, _DIGEST: digest})
        yield


def trained_place(folder: Path) -> Path:
    """Where in a run's folder the adapter or the model is; the folder itself if it is no run's.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or the run is not finished.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name a run's or an adapter's")
    if (folder / SETTINGS).is_file() and not is_done(folder):
        raise UserError(
            f"the run in {folder} is not finished: go on with it by --resume first, or name one of "
            f"its {CHECKPOINTS}"
        )
    return next((p for p in (folder / ADAPTER, folder / MODEL) if p.is_dir()), folder)
