"""`rosa compare`: methods, ranks, learning rates and seeds on one task, with equal tuning for all.

<output>/comparison.json           what all cells share
<output>/<cell>/                   the folder of one run; see `rosa.bench.storage.runs`
<output>/<cell>/error.txt          why a cell failed, if it did

A cell is (method, rank, learning rate, seed). The learning rate of each method and rank is chosen
with the first seed, on validation data held out of the training set; the other seeds train with
that rate alone. What is reported is the task's own validation set (or its test set), which nothing
was chosen on. A finished cell is never trained again, so a stopped comparison goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa.bench.grid.cell import MODELS, Job, Kind
from rosa.bench.grid.cells import run_all
from rosa.bench.grid.executors import find_executor
from rosa.bench.grid.grid import OF_A_CELL, Cell, Grid, rate_beyond
from rosa.bench.setup.checking import check
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import runs
from rosa.bench.storage.checkpoints import digest_of
from rosa.bench.storage.record import best_record, read_record
from rosa.bench.tasks.chat import usual_length
from rosa.bench.tasks.files import KINDS
from rosa.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

DIGESTS, PLANNED, TUNED_ON = "digests", "planned", "tuned_on"
"""In that file, beside what all cells share: of the data's files, the cells' names, a seed."""


def compare(
    base: RunSettings,
    grid: Grid,
    jobs: int = 1,
    console: Console | None = None,
    before: Mapping[str, float] | None = None,
    executor: str = "processes",
    widen: bool = False,
    kind: Kind = MODELS,
) -> dict[str, str]:
    """Train every cell that is not finished; returns the reasons of those that failed, by name.

    Args:
        base: what all cells share; its `output` is the comparison's folder.
        grid: what differs.
        jobs: cells that train at a time, each in a process of its own with its share of the cores.
        console: where progress is shown; None makes one.
        before: metrics of the pretrained model, for the report to show beside the trained ones.
        executor: where they train: in processes of this machine, or as tasks of ray.
        widen: where the best learning rate of a row is the lowest or the highest one tried, try
            one beyond it, half a decade at a time.
        kind: how a cell is trained.

    Raises:
        ValueError, FileNotFoundError: a setting is of no use, or the folder holds something else
            or is written to by another comparison; said before anything is trained.
    """
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
    _check_folder(base)
    kind.check(base)
    taken = f"another comparison is writing to {base.output}: wait for it, or name another folder"
    with runs.alone_in(base.output, taken):
        about = _about_all(base, grid, before)
        planned = dict.fromkeys(_about(base.output).get(PLANNED, ()))
        maker = made_by(jobs)

        def train(todo: list[Cell], title: str) -> dict[str, str]:
            planned.update(dict.fromkeys(cell.name for cell in todo))
            runs.write_json(base.output / runs.COMPARISON, {**about, PLANNED: [*planned]})
            left = [cell for cell in todo if not runs.is_done(base.output / cell.name)]
            done = len(todo) - len(left)
            console.print(f"{title}: {len(todo)} cells, {done} of them finished before")
            made = [Job(_settings_of(base, cell), cell.variant.name, kind) for cell in left]
            return run_all(made, maker, title, console)

        failures: dict[str, str] = {}
        tried: dict[tuple[str, int | None], list[Cell]] = {}
        begun: set[str] = set()
        todo = [cell for cell in cells if cell.seed == grid.seeds[0]]
        while todo:
            tuning = [cell for cell in todo if cell.seed == grid.seeds[0]]
            failures |= train(todo, "tuning" if tuning else "seeds")
            begun.update(cell.name for cell in todo)
            for cell in tuning:
                tried.setdefault(cell.group, []).append(cell)
            # A row whose rate is settled goes on while others look for theirs.
            after = [c for some in tried.values() for c in _after(base.output, some, grid, widen)]
            todo = [cell for cell in after if cell.name not in begun]
        maker.close()
        return failures


def _about_all(base: RunSettings, grid: Grid, before: Mapping[str, float] | None) -> dict[str, Any]:
    """What all cells share; UserError if cells that are there already shared something else."""
    there = _about(base.output)
    about = _shared(base) if before is None else {**_shared(base), "before": dict(before)}
    about[DIGESTS] = _check_files(base, there.get(DIGESTS))
    about[TUNED_ON] = there.get(TUNED_ON, grid.seeds[0])
    if about[TUNED_ON] != grid.seeds[0]:
        raise UserError(
            f"in {base.output} rates are chosen with seed {about[TUNED_ON]}: give it as the "
            f"first of the seeds, not {grid.seeds[0]}"
        )
    return about


def _after(folder: Path, tried: list[Cell], grid: Grid, widen: bool) -> list[Cell]:
    """What a row's trials of rates call for: one beyond them, or the best with the other seeds."""
    found = [read_record(folder / cell.name) for cell in tried if runs.is_done(folder / cell.name)]
    if not found:
        return []  # every one failed
    best = best_record(found)
    beyond = rate_beyond([cell.lr for cell in tried], best.lr) if widen else None
    if beyond is not None:
        return [replace(tried[0], lr=beyond)]
    return [replace(tried[0], lr=best.lr, seed=seed) for seed in grid.seeds[1:]]


def _settings_of(base: RunSettings, cell: Cell) -> RunSettings:
    values = {"method": cell.variant.method, "rank": cell.rank, "lr": cell.lr, "seed": cell.seed}
    options = {**cell.variant.options, "output": base.output / cell.name}
    return check(replace(base, **values, **options))


def _shared(base: RunSettings) -> dict[str, Any]:
    return {k: v for k, v in base.to_json().items() if k not in OF_A_CELL}


def _about(output: Path) -> dict[str, Any]:
    return runs.read_json(output / runs.COMPARISON) if (output / runs.COMPARISON).is_file() else {}


def _check_files(base: RunSettings, before: Mapping[str, str] | None) -> dict[str, str]:
    """Digests of the data's files; UserError if they are not those that it was begun with."""
    files = {"train": base.train, "validation": base.validation}
    if base.data is not None:
        files |= {p.relative_to(base.data).as_posix(): p for p in _data_below(base.data)}
    found = {name: digest_of(path) for name, path in files.items() if path is not None}
    known = found if before is None else before
    changed = [
        str(files.get(n) or n) for n in sorted({*known, *found}) if known.get(n) != found.get(n)
    ]
    if changed:
        raise UserError(
            f"{base.output} holds a comparison on other data: {', '.join(changed)} has changed, "
            "come or gone since it was begun. Put it back, or name a new folder"
        )
    return found


def _data_below(folder: Path) -> Iterator[Path]:
    """Files of data in a folder and those in it, but in what runs and comparisons have left."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from () if runs.is_begun(path) else _data_below(path)
        elif path.is_file() and path.suffix.lower() in KINDS:
            yield path


def _check_folder(base: RunSettings) -> None:
    output = base.output
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder")
    if not output.is_dir() or all(p.name == runs.LOCK for p in output.iterdir()):
        return
    if not (output / runs.COMPARISON).is_file():
        raise UserError(f"{output} holds files that are not a comparison's: name a new folder")
    before = {**runs.DEFAULTS, **_about(output)}  # of a version with fewer
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
