"""What several tests do: ask of a model, call the command, write files."""

from __future__ import annotations

import random
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rosa import cli
from rosa.algebra.sketch import Sketch
from rosa.bench.grid.cell import make
from rosa.bench.grid.executors import Executor
from rosa.layers.adapter import Adapter
from rosa.layers.base import RosaLayer
from rosa.resampling.active import active_adapters
from tests.models import WORDS, save_with_tokenizer, tiny_bert


def seen_by(layer: RosaLayer, adapter: str = "default") -> Sketch | None:
    """What was seen of the gradient of a layer's weight."""
    return layer.adapters[adapter].sketch


def adapters_of(model: nn.Module, optimizer: Any = None) -> list[Adapter]:
    """The active adapters of all layers."""
    return [active.adapter for active in active_adapters(model, optimizer)]


def moved(model: nn.Module, by: float = 0.2) -> None:
    """Give what is trained other values, as a training does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


def run(*arguments: object) -> None:
    """The console entry point; SystemExit(0) is a success."""
    sys.argv = ["rosa", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise


def fails(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in message
    return message


def review(good: bool) -> str:
    words = random.choices(WORDS[8:], k=4)
    return " ".join([*words, random.choice(["good", "fine"] if good else ["bad", "poor"])])


def write_csv(path: Path, rows: int = 60, labels: tuple[str, str] = ("no", "yes")) -> Path:
    lines = [f"{review(bool(i % 2))},{labels[i % 2]}" for i in range(rows)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def write_e2e(folder: Path, train: bool = False) -> None:
    """E2E's own files, of twenty meanings with two references each."""
    rows = [f'"name[P{i}], food[soup]","P{i} has {what} soup."' for i in range(20) for what in "ab"]
    names = ["devset.csv", "testset_w_refs.csv", *(["trainset.csv"] if train else [])]
    for name in names:
        (folder / name).write_text("\n".join(["mr,ref", *rows]) + "\n")


def trained_run(folder: Path, steps: int) -> None:
    """A tiny model trained by the command, drawn anew every other step: `folder`/run."""
    base = save_with_tokenizer(tiny_bert(), folder / "base")
    how = ["--model", base, "--train", write_csv(folder / "t.csv"), "--output", folder / "run"]
    run("train", *how, "--steps", steps, "--lr", 0.01, "--resample-every", 2, "--rank", 2)


class Here(Executor):
    """Makes the cells of a comparison in this process, one after the other."""

    def begin(self, job):
        made: Future = Future()
        try:
            made.set_result(make(job, 0, True, lambda share: None))
        except Exception as error:
            made.set_exception(error)
        return made

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def cause(error):
        return error
