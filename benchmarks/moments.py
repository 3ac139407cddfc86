"""Adam's moments moved into the new subspace at a draw, where B alone is trained.

    python benchmarks/moments.py --source <English> --target <German> --ranks 16 --steps 500 \\
        --lrs 5e-3,1e-2,2e-2 --seeds 0,1,2 --output runs/moments-projected

A comparison as `rosa shift` makes it, of `rosa+trained=B` alone, beside which to hold that
command's rows of `moments=clear` and `moments=keep`. With A fixed between draws, B's gradient is
G A^T for the weight's gradient G. So the first moment M (out, r) is that of G seen in the old
subspace, and M (A A^T)^-1 A A_new^T is what it says of the new one: exactly, as far as G lies in
the old one. The second moment and the count of steps are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

import rosa
from rosa.bench import shift
from rosa.bench.grid.cell import MODELS, Kind
from rosa.bench.grid.compare import compare
from rosa.bench.grid.grid import make_grid
from rosa.bench.report.writing import write_report
from rosa.bench.setup.settings import RunSettings
from rosa.resampling.active import Active

METHOD = "rosa+trained=B"


def projecting(settings: RunSettings, variant: str, told: Any) -> Any:
    """Make a run whose draws move the moments where others clear them."""
    before: dict[Tensor, Tensor] = {}
    resample = Active.resample

    def noting(active: Active, drawn: Any) -> None:
        a, b = active.factors
        before[b] = a.detach().clone()
        resample(active, drawn)

    @torch.no_grad()
    def project(state: Any, factors: Iterable[Tensor]) -> None:
        a, b = factors
        old = before.pop(b)
        moved = torch.linalg.solve(old @ old.mT, old @ a.mT)  # (r, r)
        state[b]["exp_avg"].copy_(state[b]["exp_avg"] @ moved)

    with (
        mock.patch.object(Active, "resample", noting),
        mock.patch.object(sys.modules[rosa.resample.__module__], "clear", project),
    ):
        return MODELS.train(settings, variant, told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=shift.default_cache())
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--lrs", default="5e-3,1e-2,2e-2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()

    ranks, seeds = ([int(n) for n in text.split(",")] for text in (given.ranks, given.seeds))
    grid = make_grid([METHOD], ranks, [given.lrs], seeds)
    console = Console()
    texts = shift.load_texts(given.source, given.target)
    world = shift.prepare(texts, given.cache, 64, say=console.print)
    settings = RunSettings(
        model=world.model,
        task="corpus",
        data=world.data,
        output=given.output,
        steps=given.steps,
        batch_size=16,
        max_length=64,
        target_modules=("all-linear",),
        record_changes=True,
    )
    kind = Kind(MODELS.check, projecting)
    failed = compare(settings, grid, given.jobs, console, world.start, kind=kind)
    write_report(given.output, console)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
