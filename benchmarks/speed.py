"""What ROSA costs, beside a peer in the same process: `make bench`.

    python benchmarks/speed.py --output docs/results/speed [--rows step,draw] [--rounds 7]

Each row alternates ROSA, its peer and, where there is one, the floor, so that whatever else the
machine does meets all of them; it gives the median over the rounds of the ratio of their times, and
the quartiles. speed.json holds every round's time with machine and versions, speed.md the table,
growth.png how a draw's cost grows.
"""

from __future__ import annotations

import argparse
import compileall
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import rosa
from rosa.layers.in_model import rosa_layers

RANK = 8
ATTENTION = ["query", "key", "value", "attention.output.dense"]
Jobs = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        about: what is measured.
        jobs: makes the things to time: "rosa", "peer", and perhaps "floor". What one returns is
            called after it, and not timed.
        target: what the median of rosa / peer should be at most.
        rounds: how many, if not as many as asked for.
    """

    about: str
    jobs: Callable[[], Jobs]
    target: float
    rounds: int | None = None


# -- drawing ---------------------------------------------------------------------------------------


def square_layers(count: int, width: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)])


def resample_jobs(count: int, width: int, rank: int, directions: str) -> Jobs:
    """A resample of the whole model, against torch's SVD of each weight."""
    names = [str(i) for i in range(count)]
    model = get_peft_model(
        square_layers(count, width),
        rosa.RosaConfig(r=rank, target_modules=names, directions=directions),
    )
    weights = [layer.weight.detach() for layer in square_layers(count, width)]
    thin = torch.linalg.qr(torch.randn(width, rank)).Q
    layers, rows = list(rosa_layers(model)), torch.randn(64, width)

    def resample() -> None:
        if directions == "gradient":  # as after a backward pass over 64 rows
            for _, layer in layers:
                layer.watch("default")
                layer.adapters["default"].sketch.add(rows, rows)
        rosa.resample(model)

    def svd() -> None:
        for weight in weights:
            torch.linalg.svd(weight, full_matrices=False)

    def floor() -> None:
        """Every weight read and written once, and two products of 2 M N R."""
        for weight in weights:
            weight.addmm_(thin, thin.T @ weight, alpha=-1)

    return {"rosa": resample, "peer": svd, "floor": floor}


def attach_jobs() -> Jobs:
    """`get_peft_model` on RoBERTa-base's shapes, against PEFT's LoRA with a PiSSA start."""
    model = BertForSequenceClassification(BertConfig())
    configs = {
        "rosa": rosa.RosaConfig(target_modules="all-linear", task_type="SEQ_CLS"),
        "peer": LoraConfig(
            target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights="pissa"
        ),
    }

    def attach(config) -> None:
        get_peft_model(model, config).unload()

    return {name: lambda config=config: attach(config) for name, config in configs.items()}


# -- training --------------------------------------------------------------------------------------


def step_jobs(half: bool = False, trained: str = "both", peer_fa: bool = False) -> Jobs:
    """Forward, backward and AdamW, batch 16 x 64; the floor: the frozen model, and `products`.

    Args:
        half: under autocast to bfloat16.
        trained: ROSA's factors that learn.
        peer_fa: the peer is LoRA-FA, with its own optimizer, instead of LoRA.
    """
    ids, labels = torch.randint(1000, (16, 64)), torch.randint(2, (16,))
    base = BertConfig()
    options = {"target_modules": ATTENTION, "task_type": "SEQ_CLS"}
    configs = {
        "rosa": rosa.RosaConfig(r=RANK, trained=trained, **options),
        "peer": LoraConfig(r=RANK, lora_alpha=2 * RANK, **options),
    }

    def pass_through(model, **inputs) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = model(**inputs, labels=labels).loss
        loss.backward()

    jobs: Jobs = {}
    for name, config in configs.items():
        model = get_peft_model(BertForSequenceClassification(base), config).train()
        if name == "peer" and peer_fa:
            optimizer = create_lorafa_optimizer(model, r=RANK, lora_alpha=2 * RANK, lr=1e-3)
        else:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def train(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            pass_through(model, input_ids=ids)
            optimizer.step()

        jobs[name] = train
    frozen = BertForSequenceClassification(base).train().requires_grad_(False)
    embeddings = frozen.get_input_embeddings()(ids).detach().requires_grad_()

    multiply = products(ids.numel(), base.hidden_size, torch.bfloat16 if half else torch.float32)

    def floor() -> None:
        pass_through(frozen, inputs_embeds=embeddings)
        multiply(48, "AB" if trained == "both" else trained)

    return {**jobs, "floor": floor}


def products(rows: int, width: int, dtype: torch.dtype) -> Callable[[int, str], None]:
    """The products of low-rank factors with what a layer reads and gives, alone.

    What is returned multiplies for so many layers of (width, width), forward and backward: what no
    method does without that trains the factors named beside weights that stay as they are.
    """
    x, y = (torch.randn(rows, width).to(dtype) for _ in range(2))  # near, as after the layer's own
    a, b = (torch.randn(*shape).to(dtype) for shape in ((RANK, width), (width, RANK)))

    def multiply(layers: int, trained: str) -> None:
        for _ in range(layers):
            hidden = a @ x.T
            y.T.addmm_(b, hidden, alpha=1e-6)
            inner = b.T.contiguous() @ y.T
            x.T.addmm_(a.T, inner, alpha=1e-6)
            if "A" in trained:
                inner @ x
            if "B" in trained:
                hidden @ y

    return multiply


def merged_jobs() -> Jobs:
    """Inference after `merge_and_unload`, against the base model."""
    ids = torch.randint(1000, (16, 64))
    base = BertForSequenceClassification(BertConfig(num_hidden_layers=4)).eval()
    config = rosa.RosaConfig(r=RANK, target_modules=ATTENTION, task_type="SEQ_CLS")
    trained = BertForSequenceClassification(base.config).eval()
    merged = get_peft_model(trained, config).merge_and_unload()

    def infer(model) -> None:
        with torch.no_grad():
            model(input_ids=ids)

    return {"rosa": lambda: infer(merged), "peer": lambda: infer(base)}


# -- adapters --------------------------------------------------------------------------------------


def adapters(method: str, folder: Path, count: int) -> tuple[nn.Module, list[Path]]:
    """A base model and folders of adapters of one file size: ROSA's file has the offset too."""
    options = {"target_modules": ATTENTION, "task_type": "SEQ_CLS"}
    places = []
    for number in range(count):
        config = (
            rosa.RosaConfig(r=RANK, seed=number, **options)
            if method == "rosa"
            else LoraConfig(r=2 * RANK, **options)
        )
        model = get_peft_model(BertForSequenceClassification(BertConfig()), config)
        places.append(folder / f"{method}-{number}")
        model.save_pretrained(str(places[-1]))
    return BertForSequenceClassification(BertConfig()), places


def load_jobs() -> Jobs:
    """`PeftModel.from_pretrained`, against a LoRA of the same file size."""
    folder = Path(tempfile.mkdtemp())

    def load(base, place) -> Callable[[], object]:
        return PeftModel.from_pretrained(base, place).unload

    jobs: Jobs = {}
    for name, method in (("rosa", "rosa"), ("peer", "lora")):
        base, (place,) = adapters(method, folder, 1)
        jobs[name] = lambda base=base, place=place: load(base, place)
    return jobs


def switch_jobs() -> Jobs:
    """`set_adapter` between two loaded adapters; the floor writes the touched weights once."""
    folder = Path(tempfile.mkdtemp())
    jobs: Jobs = {}
    for name, method in (("rosa", "rosa"), ("peer", "lora")):
        base, (first, second) = adapters(method, folder, 2)
        model = PeftModel.from_pretrained(base, first, adapter_name="first")
        model.load_adapter(second, adapter_name="second")

        def switch(model=model) -> None:
            model.set_adapter("second" if model.active_adapter == "first" else "first")

        jobs[name] = switch
    weights, pretrained = ([torch.randn(768, 768) for _ in range(4 * 12)] for _ in range(2))

    def floor() -> None:
        for weight, before in zip(weights, pretrained, strict=True):
            weight.copy_(before)

    return {**jobs, "floor": floor}


# -- memory and imports: processes of their own ----------------------------------------------------


def train_and_tell(method: str) -> None:
    """Train eleven steps with ten resamples; prints the peak memory of this process in MiB."""
    torch.manual_seed(0)
    ids, labels = torch.randint(1000, (16, 64)), torch.randint(2, (16,))
    options = {"target_modules": ATTENTION, "task_type": "SEQ_CLS"}
    configs = {
        "rosa": partial(rosa.RosaConfig, r=RANK),
        "rosa-b": partial(rosa.RosaConfig, r=RANK, trained="B"),
        "lora": partial(LoraConfig, r=RANK),
        "lora-fa": partial(LoraConfig, r=RANK),
    }
    base = BertForSequenceClassification(BertConfig())
    model = get_peft_model(base, configs[method](**options)).train()
    if method == "lora-fa":
        optimizer = create_lorafa_optimizer(model, r=RANK, lora_alpha=8, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for step in range(11):
        if step and method.startswith("rosa"):
            rosa.resample(model, optimizer)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    print(peak_memory_mib())


def peak_memory_mib() -> float:
    """Of this process alone: what `resource` tells begins with the parent's memory on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(*arguments: str) -> float:
    command = [sys.executable, "-W", "ignore", *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(found.stdout.split()[-1])


MEMORY = {
    "memory": ("rosa", "lora", 1.01, "both factors; peer: PEFT's LoRA"),
    "memory-b": ("rosa-b", "lora", 1.0, "B alone; peer: PEFT's LoRA"),
    "memory-b-fa": ("rosa-b", "lora-fa", 1.01, "B alone; peer: LoRA-FA by PEFT's optimizer"),
}
"""Rows of peak memory: ROSA's method and the peer's, the target of their ratio, and what it is."""


def measure_memory(methods: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Peak process memory in MiB of training with ten resamples, ROSA's and the peer's."""
    found: dict[str, list[float]] = {"rosa": [], "peer": []}
    for _ in track(range(rounds), "peak memory"):
        for name, method in zip(found, methods, strict=True):
            found[name].append(in_a_process(__file__, "--train", method))
    return found


def measure_import(rounds: int) -> list[float]:
    """Milliseconds that `import rosa` takes after `import peft`.

    Of compiled modules, as pip leaves them: a checkout, where Python may not write beside the
    sources, would be compiled anew in every process.
    """
    compileall.compile_dir(Path(rosa.__file__).parent, quiet=1)
    code = (
        "import time, peft; t = time.perf_counter(); import rosa; "
        "print(1000 * (time.perf_counter() - t))"
    )
    return [in_a_process("-c", code) for _ in track(range(rounds), "import")]


ROWS = {
    "svd": Row(
        "resample, 48 weights of 768 x 768, r 8, svd; peer: SVD of each",
        lambda: resample_jobs(48, 768, 8, "svd"),
        1 / 2,
    ),
    "orthonormal": Row(
        "the same, orthonormal", lambda: resample_jobs(48, 768, 8, "orthonormal"), 1 / 100
    ),
    "gradient": Row(
        "the same, gradient (seen in 64 rows)",
        lambda: resample_jobs(48, 768, 8, "gradient"),
        1 / 10,
    ),
    "svd-4096": Row(
        "resample, one weight of 4096 x 4096, r 16, svd; peer: its SVD",
        lambda: resample_jobs(1, 4096, 16, "svd"),
        1 / 2,
        3,
    ),
    "orthonormal-4096": Row(
        "the same, orthonormal", lambda: resample_jobs(1, 4096, 16, "orthonormal"), 1 / 500, 3
    ),
    "gradient-4096": Row(
        "the same, gradient", lambda: resample_jobs(1, 4096, 16, "gradient"), 1 / 15, 3
    ),
    "attach": Row(
        "get_peft_model, RoBERTa-base, all linear layers, defaults; peer: PEFT's PiSSA",
        attach_jobs,
        1 / 10,
        3,
    ),
    "step": Row(
        "training step, RoBERTa-base, attention, 16 x 64, r 8; peer: PEFT's LoRA", step_jobs, 0.95
    ),
    "step-bf16": Row("the same under autocast to bfloat16", lambda: step_jobs(half=True), 0.95),
    "step-b": Row(
        "the same, float32, B alone trained; peer: PEFT's LoRA",
        lambda: step_jobs(trained="B"),
        0.90,
    ),
    "step-b-fa": Row(
        "the same; peer: LoRA-FA by PEFT's optimizer",
        lambda: step_jobs(trained="B", peer_fa=True),
        0.97,
    ),
    "merged": Row("inference after merge_and_unload; peer: the base model", merged_jobs, 1.02),
    "load": Row("loading an adapter; peer: a LoRA of its file size", load_jobs, 1.5),
    "switch": Row("switching between two adapters; peer: PEFT's LoRA", switch_jobs, 1.5),
}


ALL = (*ROWS, *MEMORY, "import", "growth")


# -- how cost grows --------------------------------------------------------------------------------


def growth(say: Callable[[str], object]) -> Iterator[dict[str, object]]:
    """Seconds a draw takes, as one size at a time grows; the largest sizes without the SVDs."""
    plain = {"layers": 4, "width": 768, "r": 8}
    grids = {
        "r": [1, 4, 16, 64, 256],
        "width": [256, 512, 1024, 2048, 4096, 8192],
        "layers": [1, 4, 16, 64],
        "resamples": [1, 10, 30, 100],
    }
    for name, sizes in grids.items():
        for size in sizes:
            say(f"growth over {name}: {size}")
            at = {**plain, **({name: size} if name != "resamples" else {})}
            if name == "width":
                at["layers"] = 1
            for directions in ("svd", "orthonormal", "gradient"):
                if directions == "svd" and (size > 4096 or name == "resamples"):
                    continue
                jobs = resample_jobs(at["layers"], at["width"], at["r"], directions)
                before = size - 1 if name == "resamples" else 1
                for _ in range(before):
                    jobs["rosa"]()
                times = [clock(jobs["rosa"]) for _ in range(3)]
                yield {
                    "over": name,
                    "size": size,
                    "directions": directions,
                    "seconds": statistics.median(times),
                }
            if name in ("width", "layers") and at["width"] <= 2048:
                seconds = clock(jobs["peer"])
                yield {"over": name, "size": size, "directions": "full SVD", "seconds": seconds}


def draw_growth(points: list[dict[str, object]], path: Path) -> None:
    """Write a picture of how cost grows."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(p["over"] for p in points))
    labels = list(dict.fromkeys(p["directions"] for p in points))
    figure, axes = plt.subplots(
        1, len(names), figsize=(4 * len(names), 3.4), sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, names, strict=True):
        here = [p for p in points if p["over"] == name]
        for number, label in enumerate(labels):
            line = [p for p in here if p["directions"] == label]
            at, seconds = [p["size"] for p in line], [p["seconds"] for p in line]
            axis.loglog(at, seconds, "o-", color=f"C{number}", label=label)
        axis.set_xticks(sorted({p["size"] for p in here}), minor=False)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds a resample")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=120)


# -- the command -----------------------------------------------------------------------------------


def clock(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    after = job()
    seconds = time.perf_counter() - started
    if callable(after):
        after()
    return seconds


def measure(row: Row, rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    jobs = row.jobs()
    for job in jobs.values():
        clock(job)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in track(range(rounds), row.about[:60]):
        for name, job in jobs.items():
            times[name].append(clock(job))
    return times


def ratios(times: dict[str, list[float]], to: str) -> tuple[float, float, float]:
    """The median and the quartiles of rosa / `to`, round by round."""
    found = [r / p for r, p in zip(times["rosa"], times[to], strict=True)]
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return middle, low, high


def line_of(about: str, values: dict[str, list[float]], target: float, unit: str) -> list[str]:
    """The cells of a row of the table."""
    middle, low, high = ratios(values, "peer")
    scale = 1000 if unit == "ms" else 1
    sizes = [f"{scale * statistics.median(values[name]):.4g} {unit}" for name in ("rosa", "peer")]
    floor = f"{ratios(values, 'floor')[0]:.2f}" if "floor" in values else ""
    inverse = f" (1/{1 / middle:.0f})" if middle < 0.2 else ""
    return [
        about,
        *sizes,
        f"{middle:.3g}{inverse}",
        f"{low:.3g} to {high:.3g}",
        f"{target:.3g}",
        "yes" if middle <= target else "no",
        floor,
    ]


HEAD = ["what", "rosa", "peer", "rosa / peer", "quartiles", "target", "met", "rosa / floor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for speed.json, speed.md, growth.png")
    parser.add_argument("--rows", help=f"some of {', '.join(ALL)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.train:
        train_and_tell(options.train)
        return
    wanted = options.rows.split(",") if options.rows else list(ALL)
    if unknown := set(wanted) - set(ALL):
        parser.error(f"no row {', '.join(sorted(unknown))}: there are {', '.join(ALL)}")
    record = Record(options.output)
    for name in (n for n in ROWS if n in wanted):
        row = ROWS[name]
        values = measure(row, row.rounds or options.rounds)
        record.keep(name, values, line_of(row.about, values, row.target, "ms"))
    for name in (n for n in MEMORY if n in wanted):
        *methods, target, what = MEMORY[name]
        values = measure_memory(methods, 2)
        about = f"peak process memory, eleven steps with ten resamples, {what}"
        record.keep(name, values, line_of(about, values, target, "MiB"))
    if "import" in wanted:
        times = measure_import(options.rounds)
        middle = statistics.median(times)
        met = "yes" if middle <= 50 else "no"
        about = "import rosa, after import peft"
        line = [about, f"{middle:.0f} ms", "", "", "", "50 ms", met, ""]
        record.keep("import", {"milliseconds": times}, line)
    if "growth" in wanted:
        points = list(growth(print))
        record.keep("growth", points, None)
        if options.output:
            draw_growth(points, options.output / "growth.png")
    shown = Table(*HEAD)
    for cells in record.table():
        shown.add_row(*cells)
    Console(width=180).print(shown)


class Record:
    """What was measured, on disk after every row; rows measured before stay until measured anew."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.rows: dict[str, Any] = {}
        if folder is not None and (folder / "speed.json").is_file():
            self.rows = json.loads((folder / "speed.json").read_text())["rows"]

    def keep(self, name: str, values: object, line: list[str] | None) -> None:
        packages = ("torch", "peft", "transformers", "scipy", "rosa-finetune")
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in packages},
        }
        self.rows[name] = {"line": line, "machine": machine, "values": values}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "speed.json").write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        lines = [HEAD, ["---"] * len(HEAD), *self.table()]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        (self.folder / "speed.md").write_text(text + "\n")

    def table(self) -> list[list[str]]:
        return [self.rows[n]["line"] for n in ALL if n in self.rows and self.rows[n]["line"]]


if __name__ == "__main__":
    main()
