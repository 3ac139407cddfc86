"""Kills `rosa train` and `rosa export` at random moments, and shows that nothing was lost.

    python -m tests.crash --kills 20

A small run that draws by the gradient and hands out its schedule by itself is made once without
interruption. Then it is made again and again, each time killed (SIGKILL) or asked to stop (SIGTERM)
at a moment of chance, gone on with by `--resume`, killed again, until it ends: its adapter must be
the uninterrupted one's to the last bit. Exports are killed likewise: what is there is whole.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.crash_imports"])
KILLED, TERMINATED = -signal.SIGKILL, 128 + signal.SIGTERM

BEFORE, AFTER = "before", "after"
PLACES = [
    ("rosa.bench.train.surviving.SurvivingTrainer.training_step", 11),
    ("rosa.layers.base.RosaLayer.resample", 2),
    ("rosa.layers.base.RosaLayer.resample", 5),
    ("rosa.bench.storage.checkpoints.begin", 2),
    ("transformers.trainer.Trainer.save_model", 2),
    ("transformers.trainer.Trainer._save_optimizer_and_scheduler", 2),
    ("transformers.trainer_callback.TrainerState.save_to_json", 2),
    ("rosa.bench.storage.checkpoints.finish", 2),
    ("rosa.bench.storage.checkpoints.finish", 5),
    ("rosa.bench.storage.checkpoints.rotate_checkpoints", 3),
    ("rosa.bench.train.training.save_trained", 1),
    ("rosa.bench.storage.runs.write_json", 2),
]
"""Where a run is killed, and at which call of that: before it and after it."""


@dataclass(frozen=True)
class Sabotage:
    """What happens to a process in the `call`-th call of a function, by its whole name.

    Attributes:
        place: of the function.
        call: from 1.
        when: `BEFORE` the call or `AFTER` it.
        signal: that the process sends to itself.
    """

    place: str
    call: int
    when: str = BEFORE
    signal: int = signal.SIGKILL


def run(
    arguments: list[Any],
    sabotage: Sabotage | None = None,
    largest: int | None = None,
    log: Path | None = None,
) -> int:
    """Run the command in a process of its own; its exit code, or minus the signal it died of.

    Args:
        arguments: of the command.
        sabotage: what happens to it.
        largest: bytes that a file may have: for more, the disk is full.
        log: file that what it prints is added to.
    """
    process = start(arguments, sabotage, largest, log)
    process.join()
    return process.exitcode  # type: ignore[return-value]


def start(arguments: list[Any], *how: Any) -> Any:
    """As `run`, without waiting for the process."""
    process = CONTEXT.Process(target=_command, args=(list(map(str, arguments)), *how))
    process.start()
    return process


def _command(
    arguments: list[str],
    sabotage: Sabotage | None = None,
    largest: int | None = None,
    log: Path | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    os.environ |= environment or {}
    import torch

    descriptor = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())

    from rosa import cli
    from rosa.resampling import callback, schedule

    torch.set_num_threads(1)
    # A run of thirty steps then has what a long one has.
    schedule.SHORTEST_ROUND, callback.COUNTED, schedule.FIRST = 6, 5, 7
    schedule.ITEMS_A_NUMBER = 0.01  # type: ignore[assignment]
    if sabotage is not None:
        _put(sabotage)
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = ["rosa", *arguments]
    cli.main()


def _put(sabotage: Sabotage) -> None:
    owner, name = _owner(sabotage.place)
    inner: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def stumble(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == sabotage.call and sabotage.when == BEFORE:
            os.kill(os.getpid(), sabotage.signal)
        found = inner(*args, **kwargs)
        if calls == sabotage.call and sabotage.when == AFTER:
            os.kill(os.getpid(), sabotage.signal)
        return found

    setattr(owner, name, stumble)


def _owner(place: str) -> tuple[Any, str]:
    parts = place.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ImportError(place)


def command(folder: Path, output: Path, *more: Any, rank: int | None = 2) -> list[Any]:
    """`rosa train` of the small run, whose model and data `prepare` has put into `folder`."""
    how = ["--steps", 30, "--batch-size", 8, "--lr", 0.01, "--weight-decay", 0.1]
    how += [] if rank is None else ["--rank", rank]
    files = ["--model", folder / "base", "--train", folder / "reviews.csv"]
    return ["train", *files, *how, "--output", output, *more]


def prepare(folder: Path) -> None:
    """Write a tiny model and reviews to train it on."""
    from tests.helpers import write_csv
    from tests.models import save_with_tokenizer, tiny_bert

    save_with_tokenizer(tiny_bert(), folder / "base")
    write_csv(folder / "reviews.csv", rows=150)


def differences(run: Path, other: Path) -> list[str]:
    """Names of tensors in which two runs' adapters are not the same to the last bit."""
    one, two = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (run, other))
    return [key for key in one.keys() | two.keys() if not _same(one.get(key), two.get(key))]


def _same(one: Any, two: Any) -> bool:
    return one is not None and two is not None and one.equal(two)


def main() -> None:
    """See the module."""
    import tempfile

    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of trainings, and half of exports")
    parser.add_argument("--seed", type=int, default=None, help="of the moments")
    given = parser.parse_args()
    seed = random.randrange(2**31) if given.seed is None else given.seed
    chance, console = random.Random(seed), Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        whole, out = folder / "whole", folder / "run"
        began = time.perf_counter()
        assert run(command(folder, whole)) == 0
        seconds = time.perf_counter() - began
        ends = 0
        for _ in track(range(given.kills), f"killing trainings (seed {seed})", console=console):
            kind = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            again = ["--resume"] if (out / "settings.json").exists() else []
            code = kill_at(chance.uniform(0, seconds), kind, command(folder, out, *again))
            assert code in (0, KILLED, -signal.SIGTERM, TERMINATED), code
            if code == 0:
                ends += 1
                assert not differences(out, whole), differences(out, whole)
                out = folder / f"run-{ends}"
        if (out / "settings.json").exists():
            assert run(command(folder, out, "--resume")) == 0
            assert not differences(out, whole), differences(out, whole)
        for n in track(range(given.kills // 2), "killing exports", console=console):
            form = ["merged", "lora", "rosa"][n % 3]
            export = ["export", whole, "--to", form, "--output", folder / f"export-{n}"]
            kind = chance.choice([signal.SIGKILL, signal.SIGTERM])
            if kill_at(chance.uniform(0, seconds), kind, export) != 0:
                left = [p.name for p in (folder / f"export-{n}").glob("[!.]*")]
                assert not left or "config.json" in left, left
                if not left:
                    assert run(export) == 0
    console.print(
        f"{given.kills} trainings and {given.kills // 2} exports were killed: all the same"
    )


def kill_at(seconds: float, kind: int, arguments: list[Any]) -> int:
    """Run the command, send it a signal after so many seconds, and return its exit code."""
    process = start(arguments)
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, kind)
    process.join()
    return process.exitcode


if __name__ == "__main__":
    main()
