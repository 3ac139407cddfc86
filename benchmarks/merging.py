"""Merging a model that is larger than the memory: `rosa export`, with and without --low-memory.

    python benchmarks/merging.py --output docs/results/memory

Makes a Llama of random weights and an adapter of it, and exports it in processes of their own.
Their memory is what they must have (anonymous; pages of files are given back when they are needed).
With --limit-mib it is limited by a control group, which takes root and Linux: one that needs more
is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from rosa import RosaConfig
from rosa.bench.report.tables import comparison_table

COLUMNS = ["export", "memory it takes, MiB", "seconds", "ended"]
WAYS = {"--to merged": [], "--to merged --low-memory": ["--low-memory"]}
GROUP = Path("/sys/fs/cgroup/memory/rosa-merging")


def make(folder: Path, layers: int) -> int:
    """A base model and an adapter of it; returns the bytes of the base."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=8,
        num_hidden_layers=layers,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="500MB")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    how = RosaConfig(
        r=8, directions="orthonormal", target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, how)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(str(folder / "adapter"))
    model.config.save_pretrained(str(folder / "adapter"))
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))


def export(folder: Path, extra: list[str], limit: int | None) -> dict[str, Any]:
    """Export in a process of its own, and watch what memory it takes."""
    output = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "rosa", "export", str(folder / "adapter"), "--to", "merged"]
    command += ["--output", str(output / "merged"), "--max-shard-size", "100MB", *extra]
    begin, peak = time.perf_counter(), 0
    run = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=None if limit is None else join_group,
    )
    while run.poll() is None:
        peak = max(peak, anonymous(run.pid))
        time.sleep(0.01)
    ended = "done" if run.returncode == 0 else f"killed, {run.returncode}"
    return {"mib": peak / 1024, "seconds": time.perf_counter() - begin, "ended": ended}


def anonymous(pid: int) -> int:
    """KiB of a process's memory that are not pages of files; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def join_group() -> None:
    (GROUP / "cgroup.procs").write_text(str(os.getpid()))


def main(
    output: Annotated[Path, typer.Option(help="Folder for the numbers.")],
    layers: Annotated[int, typer.Option(help="Of the model; 12.7 million weights each.")] = 72,
    limit_mib: Annotated[int | None, typer.Option(help="Limit the exports' memory.")] = None,
) -> None:
    """Export a model both ways; print and write what memory that takes."""
    if limit_mib is not None:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(limit_mib << 20))
    with tempfile.TemporaryDirectory() as place:
        size = make(Path(place), layers) / 2**20
        found = {
            name: export(Path(place), extra, limit_mib)
            for name, extra in track(WAYS.items(), "Exporting")
        }
    if limit_mib is not None:
        GROUP.rmdir()
    limit = "no limit" if limit_mib is None else f"a limit of {limit_mib} MiB"
    title = f"a model of {size:,.0f} MiB, {limit}"
    rows = [[n, f"{r['mib']:,.0f}", f"{r['seconds']:.0f}", r["ended"]] for n, r in found.items()]
    Console().print(comparison_table(title, COLUMNS, rows))
    output.mkdir(parents=True, exist_ok=True)
    name = "merging" if limit_mib is None else f"merging-{limit_mib}"
    content = {"model_mib": size, "limit_mib": limit_mib, "layers": layers, "exports": found}
    (output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
