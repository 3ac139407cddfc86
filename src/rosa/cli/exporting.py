"""The command that turns an adapter into something else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rosa.cli.app import Private, PushToHub, command
from rosa.cli.recipes import Config


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
