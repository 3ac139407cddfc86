"""The result records of a comparison, read back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import unquote

from rosa.bench.grid.cell import ERROR
from rosa.bench.grid.compare import DIGESTS, PLANNED, TUNED_ON
from rosa.bench.storage import models, runs
from rosa.bench.storage.record import Record, best_record, read_record
from rosa.errors import UserError

_CELL = re.compile(r"(.*)-lr(\d[\d.e+-]*)-s\d+")
"""The name of a cell's folder: its row, and its rate."""


@dataclass
class Row:
    """A method at a rank, at its chosen learning rate, over all seeds."""

    method: str
    rank: int | None
    lr: float
    at_edge: bool
    rates: int  # that were tried
    records: list[Record]
    histories: list[dict[str, Any]] = field(repr=False)

    @property
    def name(self) -> str:
        """The method with its rank."""
        return self.method if self.rank is None else f"{self.method}, r {self.rank}"

    def scores(self, name: str) -> list[float]:
        """A metric of every seed."""
        return [record.scores[name] for record in self.records]

    def mean(self, value: Callable[[Record], float]) -> float:
        """The mean over the seeds of something of a record."""
        return mean(value(record) for record in self.records)


@dataclass
class Comparison:
    """What a comparison's folder holds.

    Attributes:
        metric: what is reported, as it is called in the records (`test_...`).
        settings: what all cells share.
        further: what is reported beside it, of other texts or sets, as it is called in the records.
        before: metrics of the pretrained model, where they were measured.
        cells: the record of every finished cell, also of learning rates that were not chosen.
        failed: names of the cells that ended with an error.
        unfinished: names of the cells that were asked for and have not ended.
    """

    folder: Path
    metric: str
    further: list[str]
    before: dict[str, float]
    settings: dict[str, Any]
    cells: dict[str, Record]
    rows: list[Row]
    failed: list[str]
    unfinished: list[str]


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder.

    Raises:
        FileNotFoundError: it is not one.
        ValueError: no cell of it is finished, or a file is damaged.
    """
    if not (folder / runs.COMPARISON).is_file():
        raise FileNotFoundError(f"{folder} is not a comparison's folder (no {runs.COMPARISON})")
    groups: dict[tuple[str, int | None], list[tuple[Record, Path]]] = {}
    failed, unfinished = [], []
    diverged: dict[str, list[float]] = {}  # rates that failed, by the begin of their cells' names
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        if runs.is_done(place):
            record = read_record(place)
            groups.setdefault((record.variant, record.rank), []).append((record, place))
        elif (place / ERROR).is_file():
            failed.append(_shown(place.name))
            if named := _CELL.fullmatch(place.name):
                diverged.setdefault(named[1], []).append(float(named[2]))
        elif runs.settings_of(place):
            unfinished.append(_shown(place.name))
    if not groups:
        raise UserError(
            f"{folder} has no finished run yet: go on with it by the same `rosa compare` command"
        )
    rows = [
        _row(*group, cells, diverged.get(cells[0][1].name.rsplit("-lr", 1)[0], []))
        for group, cells in groups.items()
    ]
    first = rows[0].records[0]
    settings = runs.read_json(folder / runs.COMPARISON)
    # A report is for others: not where files lie on this machine.
    if settings.get("model"):
        settings["model"] = models.model_name(settings["model"])
    for name in ("data", "train", "validation"):
        if settings.get(name):
            settings[name] = _without_machine(settings[name])
    rows.sort(key=lambda row: (row.rank or 0, row.method))
    cells = {
        _shown(place.name): replace(record, variant=_shown(record.variant))
        for group in groups.values()
        for record, place in group
    }
    before, planned = settings.pop("before", {}), settings.pop(PLANNED, [])
    for name in (DIGESTS, TUNED_ON):
        settings.pop(name, None)
    begun = {*cells, *failed, *unfinished}
    unfinished += [name for name in map(_shown, planned) if name not in begun]
    known = {f"{part}_{first.metric}" for part in ("train", "eval", "test")}
    further = [k for k in first.scores if k.endswith(f"_{first.metric}") and k not in known]
    return Comparison(
        folder, first.reported, further, before, settings, cells, rows, failed, unfinished
    )


def _without_machine(path: str) -> str:
    """A path's last two parts if it is absolute, else the path."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _shown(variant: str) -> str:
    """The name of a variant, or of its cell, as a report says it: its own settings may be paths."""
    options = (part.partition("=") for part in unquote(variant).split("+"))
    return "+".join(f"{name}{equals}{_without_machine(value)}" for name, equals, value in options)


def _row(
    method: str, rank: int | None, cells: list[tuple[Record, Path]], diverged: list[float]
) -> Row:
    """Choose the learning rate by the validation metric of the seed that tried the most of them.

    Rates that failed were tried too.
    """
    ((tuned_on, _),) = Counter(record.seed for record, _ in cells).most_common(1)
    tuning = [record for record, _ in cells if record.seed == tuned_on]
    lr = best_record(tuning).lr
    rates = [*(record.lr for record in tuning), *diverged]
    chosen = sorted((c for c in cells if c[0].lr == lr), key=lambda cell: cell[0].seed)
    return Row(
        _shown(method),
        rank,
        lr,
        len(rates) > 1 and lr in (min(rates), max(rates)),
        len(set(rates)),
        [record for record, _ in chosen],
        [runs.read_json(place / runs.HISTORY) for _, place in chosen],
    )
