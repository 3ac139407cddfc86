"""What the exact copy of half-precision weights costs, and what it does to map their files instead.

    python benchmarks/copies.py --output docs/results/memory

Makes a Llama of random weights, saves it, and in a process each loads it, adapts all of its linear
layers and draws. Memory is what the process must have; pages of files are given back when they are
needed.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from merging import anonymous, make
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from transformers import LlamaForCausalLM

from rosa import RosaConfig, map_pretrained, resample
from rosa.bench.report.tables import comparison_table

COLUMNS = ["exact weights", "memory, MiB", "of the process alone", "seconds a draw"]
DRAWS = 5


def measure(base: Path, mapped: bool) -> dict[str, Any]:
    """In a process of its own."""
    begin = anonymous(os.getpid())
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = RosaConfig(r=8, directions="orthonormal", target_modules="all-linear")
    model = get_peft_model(model, config)
    if mapped:
        map_pretrained(model)
    seconds = []
    for _ in range(DRAWS):
        start = time.perf_counter()
        resample(model)
        seconds.append(time.perf_counter() - start)
    mib = anonymous(os.getpid()) / 1024
    return {"mib": mib, "begin_mib": begin / 1024, "seconds": statistics.median(seconds)}


def main(
    output: Annotated[Path, typer.Option(help="Folder for the numbers.")],
    layers: Annotated[int, typer.Option(help="Of the model; 12.7 million weights each.")] = 72,
) -> None:
    """Adapt and draw with copies and with mapped files; print and write what memory that takes."""
    ways = {"copied": False, "mapped from the files": True}
    found = {}
    with tempfile.TemporaryDirectory() as place:
        size = make(Path(place), layers) / 2**20
        for name, mapped in track(ways.items(), "Drawing"):
            with get_context("spawn").Pool(1) as pool:
                found[name] = pool.apply(measure, (Path(place) / "base", mapped))
    rows = [
        [name, f"{r['mib']:,.0f}", f"{r['begin_mib']:,.0f}", f"{r['seconds']:.1f}"]
        for name, r in found.items()
    ]
    title = f"a model of {size:,.0f} MiB in bfloat16, {DRAWS} draws"
    Console().print(comparison_table(title, COLUMNS, rows))
    output.mkdir(parents=True, exist_ok=True)
    content = {"model_mib": size, "layers": layers, "draws": DRAWS, "ways": found}
    (output / "copies.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
