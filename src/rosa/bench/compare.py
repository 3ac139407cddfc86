"""`rosa compare`: methods, ranks, learning rates and seeds on one task, with equal tuning for all.

<output>/comparison.json           what all cells share
<output>/<cell>/                   the folder of one run; see `rosa.bench.runs`
<output>/<cell>/error.txt          why a cell failed, if it did

A cell is (method, rank, learning rate, seed). The learning rate of each method and rank is chosen
with the first seed, on validation data held out of the training set; the other seeds train with
that rate alone. What is reported is the task's own validation set (or its test set), which nothing
was chosen on. A finished cell is never trained again, so a stopped comparison goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rosa.bench import runs
from rosa.bench.cell import Job
from rosa.bench.cells import run_all
from rosa.bench.checking import check
from rosa.bench.executors import Executor, find_executor
from rosa.bench.methods import METHODS, find_method
from rosa.bench.record import best_record, read_record
from rosa.bench.settings import RunSettings, convert
from rosa.bench.tasks.chat import usual_length
from rosa.bench.training import load_task
from rosa.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON, LOCK = "comparison.json", ".lock"
LR_FACTORS = (0.3, 1.0, 3.0)
"""Learning rates that are tried unless some are named: these, times the method's own default."""

# What makes one cell differ from another; the comparison's settings are all else.
_OF_A_CELL = ("output", "method", "rank", "lr", "seed", "versions")


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own: `rosa+directions=orthonormal+resample_every=never`."""

    name: str
    method: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a variant; ValueError lists the methods and the settings that there are."""
        method, *options = text.split("+")
        find_method(method)
        types = {f.name: str(f.type) for f in fields(RunSettings) if f.name not in _OF_A_CELL}
        values = {}
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or name not in types:
                raise UserError(
                    f"{text!r}: {option!r} is not setting=value with a setting of a run; there "
                    f"are: {', '.join(types)}"
                )
            if name == "set":  # of which there may be several, each a value of YAML
                values[name] = (*values.get(name, ()), value)
            else:
                values[name] = convert(f"{text!r}: {name}", value, types[name])
        return cls(text, method, values)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    variant: Variant
    rank: int | None
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, for people and to find it again; its record says what it is."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        variant = re.sub(r"[/\\%]", lambda sign: quote(sign[0], safe=""), self.variant.name)
        return f"{variant}{rank}-lr{self.lr:g}-s{self.seed}"

    @property
    def group(self) -> tuple[str, int | None]:
        """What shares a learning rate, and is a row of the table."""
        return self.variant.name, self.rank


@dataclass(frozen=True)
class Grid:
    """What to compare: every variant at every rank (if it has one), rate and seed.

    `lrs` holds rates by method's or variant's name, and for all others under "".
    """

    variants: tuple[Variant, ...]
    ranks: tuple[int, ...]
    lrs: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]

    def rates(self, variant: Variant) -> tuple[float, ...]:
        """The learning rates to try for a variant."""
        named = self.lrs.get(variant.name) or self.lrs.get(variant.method) or self.lrs.get("")
        default = METHODS[variant.method].lr
        return named or tuple(float(f"{factor * default:g}") for factor in LR_FACTORS)

    def groups(self) -> Iterator[tuple[Variant, int | None]]:
        """The rows of the table."""
        for variant in self.variants:
            has_rank = METHODS[variant.method].has_rank
            for rank in self.ranks if has_rank else (None,):
                yield variant, rank


def make_grid(
    methods: Sequence[str], ranks: Sequence[int], lrs: Sequence[str], seeds: Sequence[int]
) -> Grid:
    """A grid from the command line's words; `lrs` are "1e-4,1e-3" or "full=1e-5,3e-5".

    Raises:
        ValueError: something is missing, unknown or given twice.
    """
    if not methods:
        raise UserError(f"no methods: name some of {', '.join(METHODS)}")
    if not seeds:
        raise UserError("no seeds: name at least one, or three for a spread")
    for name, values in (("methods", methods), ("ranks", ranks), ("seeds", seeds)):
        if len(set(values)) != len(values):
            raise UserError(f"{name} has one twice: {', '.join(map(str, values))}")
    variants = tuple(Variant.parse(text) for text in methods)
    ranked = [v.name for v in variants if METHODS[v.method].has_rank]
    if ranks and not ranked:
        raise UserError(f"none of the methods has a rank ({', '.join(methods)}): leave --ranks out")
    rates: dict[str, tuple[float, ...]] = {}
    for text in lrs:
        name, equals, values = text.rpartition("=")
        # A variant's own settings have an = too: "rosa+moments=keep=1e-3" names rosa+moments=keep.
        known = {v.name for v in variants} | {v.method for v in variants}
        if equals and name not in known:
            raise UserError(f"--lrs {text}: {name!r} is none of the methods compared")
        try:
            rates[name] = tuple(sorted({float(value) for value in values.split(",")}))
        except ValueError:
            raise UserError(f"--lrs {text}: {values!r} are not numbers, as in 1e-4,1e-3") from None
    return Grid(variants, tuple(ranks) or (8,), rates, tuple(seeds))


def compare(
    base: RunSettings,
    grid: Grid,
    jobs: int = 1,
    console: Console | None = None,
    before: Mapping[str, float] | None = None,
    executor: str = "processes",
) -> dict[str, str]:
    """Train every cell that is not finished; returns the reasons of those that failed, by name.

    Args:
        base: what all cells share; its `output` is the comparison's folder.
        grid: what differs.
        jobs: cells that train at a time, each in a process of its own with its share of the cores.
        console: where progress is shown; None makes one.
        before: metrics of the pretrained model, for the report to show beside the trained ones.
        executor: where they train: in processes of this machine, or as tasks of ray.

    Raises:
        ValueError, FileNotFoundError: a setting is of no use, or the folder holds something else
            or is written to by another comparison; said before anything is trained.
    """
    from filelock import FileLock, Timeout
    from rich.console import Console

    console = console or Console()
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    made_by = find_executor(executor)
    longest = base.max_length or usual_length(base.train)
    base = replace(base, hold_out=True, max_length=longest)
    cells = [
        Cell(variant, rank, rate, seed)
        for variant, rank in grid.groups()
        for rate in grid.rates(variant)
        for seed in grid.seeds
    ]
    for cell in cells:
        _settings_of(base, cell)  # checks it
    runs.check_model(base.model)
    _check_folder(base)
    load_task(base)  # raises where the data is of no use
    base.output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(base.output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another comparison is writing to {base.output}: wait for it, or name another folder"
        ) from None
    try:
        about = _shared(base) if before is None else {**_shared(base), "before": dict(before)}
        runs.write_json(base.output / COMPARISON, about)
        tuning = [cell for cell in cells if cell.seed == grid.seeds[0]]
        maker = made_by(jobs)
        failures = _train_all(base, tuning, maker, "tuning", console)
        chosen = {}
        for cell in tuning:
            chosen.setdefault(cell.group, []).append(cell)
        best = {group: _best(base.output, some) for group, some in chosen.items()}
        rest = [
            cell for cell in cells if cell.seed != grid.seeds[0] and cell.lr == best[cell.group]
        ]
        failures |= _train_all(base, rest, maker, "seeds", console)
        maker.close()
        return failures
    finally:
        lock.release()


def _settings_of(base: RunSettings, cell: Cell) -> RunSettings:
    values = {"method": cell.variant.method, "rank": cell.rank, "lr": cell.lr, "seed": cell.seed}
    options = {**cell.variant.options, "output": base.output / cell.name}
    return check(replace(base, **values, **options))


def _shared(base: RunSettings) -> dict[str, Any]:
    return {k: v for k, v in base.to_json().items() if k not in _OF_A_CELL}


def _check_folder(base: RunSettings) -> None:
    output = base.output
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder")
    if not output.is_dir() or all(p.name == LOCK for p in output.iterdir()):
        return
    if not (output / COMPARISON).is_file():
        raise UserError(f"{output} holds files that are not a comparison's: name a new folder")
    before = {**runs.DEFAULTS, **runs.read_json(output / COMPARISON)}  # of a version with fewer
    differ = [
        f"{name} ({before.get(name)} there, {value} here)"
        for name, value in _shared(base).items()
        if before.get(name) != value
    ]
    if differ:
        raise UserError(
            f"{output} holds a comparison with other settings: {'; '.join(differ)}. Give the same "
            "to go on with it, or name a new folder"
        )


def _best(folder: Path, cells: list[Cell]) -> float | None:
    """The chosen learning rate of cells that differ in it alone; None if every one failed."""
    found = [read_record(folder / c.name) for c in cells if runs.is_done(folder / c.name)]
    return best_record(found).lr if found else None


def _train_all(
    base: RunSettings, cells: list[Cell], executor: Executor, title: str, console: Console
) -> dict[str, str]:
    """Train what is not finished; returns why cells failed, by name."""
    todo = [cell for cell in cells if not runs.is_done(base.output / cell.name)]
    done = len(cells) - len(todo)
    console.print(f"{title}: {len(cells)} cells, {done} of them finished before")
    made = [Job(_settings_of(base, cell), cell.variant.name) for cell in todo]
    return run_all(made, executor, title, console)
