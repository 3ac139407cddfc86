"""Seconds a draw in 1, 2 and 4 processes: each layer drawn in one of them, beside all in each.

    python benchmarks/draws.py --output docs/results/draws

A model of linear layers, random weights, float32, gloo, one thread a process. "shared" is how
`rosa.resample` draws; "alone" are the same processes with adapters of other names, which draw every
layer by themselves, as processes that share nothing have to. The two take turns, the slowest
process counts, medians of the rounds. A ratio to one process is bounded by the machine's cores.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from torch import distributed, multiprocessing, nn

from rosa import RosaConfig, resample, watch
from rosa.bench.report.tables import comparison_table

COLUMNS = ["directions", "processes", "alone, s", "shared, s", "shared / alone", "shared / one's"]
COUNTS = (1, 2, 4)
WIDTHS = (768, 3072)


def adapted(directions: str, layers: int, adapter: str) -> Any:
    torch.manual_seed(0)
    wide, deep = (nn.Linear(*shape, bias=False) for shape in (WIDTHS, WIDTHS[::-1]))
    base = nn.Sequential(
        *(
            type(one)(one.in_features, one.out_features, bias=False)
            for one in (wide, deep) * (layers // 2)
        )
    )
    config = RosaConfig(
        r=8, directions="orthonormal", target_modules=[str(i) for i in range(len(base))]
    )
    model = get_peft_model(base, config, adapter_name=adapter)
    config.directions = directions  # the first draw, of each process by itself, is not measured
    return model


def one_draw(model: Any) -> float:
    """Seconds of a draw, in the slowest process."""
    if watch(model):
        model(torch.randn(16, WIDTHS[0])).square().mean().backward()
    distributed.barrier()
    begin = time.perf_counter()
    resample(model)
    seconds = torch.tensor(time.perf_counter() - begin)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return float(seconds)


def work(rank: int, count: int, folder: str, layers: int, rounds: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{count}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    found = {}
    for directions in ("svd", "gradient"):
        ways = {"shared": "default", "alone": f"of-{rank}"}
        models = {way: adapted(directions, layers, name) for way, name in ways.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(rounds + 1):
            for way, model in models.items():
                taken = one_draw(model)
                if i > 0:  # the first one warms up
                    seconds[way].append(taken)
        found[directions] = seconds
    if rank == 0:
        Path(folder, f"{count}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def main(
    output: Annotated[Path, typer.Option(help="Folder for the numbers.")],
    layers: Annotated[int, typer.Option(help="Of the model, of 768 to 3072 and back.")] = 12,
    rounds: Annotated[int, typer.Option(help="Draws that are measured, each way.")] = 5,
) -> None:
    """Measure, print and write seconds a draw."""
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})  # of the processes
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            multiprocessing.spawn(work, (count, folder, layers, rounds), nprocs=count)
            found[str(count)] = json.loads(Path(folder, f"{count}.json").read_text())
    rows = []
    for directions in ("svd", "gradient"):
        one = statistics.median(found["1"][directions]["shared"])
        for count in COUNTS:
            by_way = found[str(count)][directions]
            alone, shared = (statistics.median(by_way[way]) for way in ("alone", "shared"))
            ratios = f"{shared / alone:.2f}", f"{shared / one:.2f}"
            rows.append([directions, str(count), f"{alone:.3f}", f"{shared:.3f}", *ratios])
    shape = f"{layers} layers of {WIDTHS[0]} x {WIDTHS[1]}, {os.cpu_count()} cores"
    Console().print(comparison_table(f"Seconds a draw: {shape}", COLUMNS, rows))
    output.mkdir(parents=True, exist_ok=True)
    content = {"layers": layers, "widths": WIDTHS, "cores": os.cpu_count(), "seconds": found}
    (output / "draws.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
