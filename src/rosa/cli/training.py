"""Commands for one model: train it, evaluate it, let it write, and plan its training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rosa.bench import processes
from rosa.bench.setup.options import OPTIONS, option, settings_of, takes
from rosa.bench.setup.settings import DATA, OUTPUT, PLAN, TRAINING
from rosa.cli.app import Private, PushToHub, command
from rosa.cli.recipes import Config, Recipe
from rosa.errors import UserError


@command()
@takes(*OPTIONS)
def train(
    context: typer.Context,
    recipe: Recipe = None,
    resume: Annotated[
        bool, option(OUTPUT, "Go on with the output folder's run, by its own command.", "--resume")
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
    from rosa.bench.storage.runs import kept_step, trained_place
    from rosa.bench.train.training import train as run

    _check_meant(context)
    settings = settings_of(given)
    if dry_run:
        from rosa.bench.rehearsal import COLUMNS, rehearse

        rows, about = rehearse(settings, resume, overwrite)
        Console().print(comparison_table("what would be trained", COLUMNS, rows))
        Console().print(metrics_table("the run", about))
        print("activations come on top of this memory; nothing was trained or written")
        return
    if push_to_hub is not None:
        check(settings)
    check_hub(push_to_hub, private)
    record = run(settings, resume=resume, overwrite=overwrite)
    Console().print(metrics_table(str(given["output"]), record.to_json()))
    kept = kept_step(given["output"])
    if kept not in (None, record.steps) and processes.is_first():
        print(
            f"the model of step {kept} of {record.steps} is kept: the best {record.metric}, of "
            "equals the first"
        )
    if push_to_hub is not None and processes.is_first():
        print(f"pushed to {push(trained_place(given['output']), push_to_hub)}")


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


def _said() -> str:
    """The next line at the terminal; nothing if there is none."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
