"""`rosa synthetic`: the paper's regression, where the true change of the weights has a known rank.

A linear layer 512 -> 32, or two with 64 hidden units and a ReLU between, is to become itself plus
a change of rank 24 in every layer, from 5,000 examples. LoRA below that rank cannot; ROSA and full
fine-tuning can (Abdel Hameed et al., 2024, figures 1 and 2).

Every method is trained by Adam at a learning rate that falls linearly to zero. It begins at the one
of several with the lowest final validation loss, chosen per method and rank with the first seed;
what is reported is the loss on other data, the test set.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rosa.bench import runs
from rosa.errors import UserError

MODELS = ("linear", "mlp")
METHODS = {
    "lora": "LoRA",
    "rosa": "ROSA, singular directions",
    "rosa-orthonormal": "ROSA, random directions",
    "rosa-gradient": "ROSA, gradient directions",
    "full": "full fine-tuning",
}
DIRECTIONS = {"rosa": "svd", "rosa-orthonormal": "orthonormal", "rosa-gradient": "gradient"}
INPUTS, HIDDEN, OUTPUTS, TRUE_RANK = 512, 64, 32, 24
EXAMPLES = {"train": 5000, "validation": 1000, "test": 1000}
RESULT = "synthetic.json"
# Where a search for a learning rate begins, and where it can go: half a decade at a time.
FIRST_LRS = (1e-2, 3e-2, 1e-1)
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
POINTS = 50  # of a run's curve
SOON = 0.01  # a run is said to be there when its loss is this part of the start's


@dataclass(frozen=True)
class Run:
    """One run; `resample_every` in epochs."""

    model: str
    method: str
    rank: int | None
    lr: float
    seed: int
    epochs: int
    resample_every: int
    batch_size: int = 64

    @property
    def name(self) -> str:
        """Its key in the result file."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.model}-{self.method}{rank}-lr{self.lr:g}-s{self.seed}"


def train(run: Run) -> dict[str, Any]:
    """Train one run.

    Returns:
        `curve`, pairs of an epoch and the loss on validation data after it, at most `POINTS` of
        them, the last epoch's among them; `validation` and `test`, the losses at the end;
        `before`, the loss on test data at the start; `trainable_parameters`.
    """
    import torch
    from torch.nn.functional import mse_loss

    import rosa

    torch.set_num_threads(1)  # the matrices are small
    torch.manual_seed(run.seed)
    start, data = _problem(run.model)
    model = _adapt(start, run)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(factors, lr=run.lr)
    x, y = data["train"]
    steps = run.epochs * -(-len(x) // run.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    curve = []

    @torch.no_grad()
    def loss_on(model: Any, split: str) -> float:
        x, y = data[split]
        return float(f"{mse_loss(model(x), y):.4g}")  # more digits would only make a long file

    for epoch in range(run.epochs):
        if _draws(run, epoch):
            seen = ()
            if run.method == "rosa-gradient":
                seen = torch.randperm(len(x))[: 4 * run.batch_size].split(run.batch_size)
            rosa.resample(
                model,
                optimizer,
                batches=seen,
                loss=lambda model, batch: mse_loss(model(x[batch]), y[batch]),
            )
        for batch in torch.randperm(len(x)).split(run.batch_size):
            loss = mse_loss(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) * POINTS // run.epochs > epoch * POINTS // run.epochs:
            curve.append([epoch + 1, loss_on(model, "validation")])
    return {
        "curve": curve,
        "validation": curve[-1][1],
        "test": loss_on(model, "test"),
        "before": loss_on(start, "test"),
        "trainable_parameters": sum(p.numel() for p in factors),
    }


def _draws(run: Run, epoch: int) -> bool:
    """Whether subspaces are drawn at the begin of an epoch; by the gradient, at the first too."""
    first = 0 if run.method == "rosa-gradient" else run.resample_every
    return run.method in DIRECTIONS and epoch >= first and epoch % run.resample_every == 0


def _problem(kind: str) -> tuple[Any, dict[str, Any]]:
    """The model to start from, and data of the true model: drawn from torch's global generator."""
    import torch
    from torch import nn

    sizes = [INPUTS, OUTPUTS] if kind == "linear" else [INPUTS, HIDDEN, OUTPUTS]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    start = nn.Sequential(*layers[:-1])
    true = copy.deepcopy(start)
    data = {}
    with torch.no_grad():
        for layer in true:
            if isinstance(layer, nn.Linear):
                out, inputs = layer.weight.shape
                layer.weight += torch.randn(out, TRUE_RANK) @ torch.randn(TRUE_RANK, inputs)
        for split, count in EXAMPLES.items():
            x = torch.randn(count, INPUTS)
            data[split] = x, true(x)
    return start.requires_grad_(True), data


def _adapt(start: Any, run: Run) -> Any:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    import rosa

    model = copy.deepcopy(start)
    if run.method == "full":
        return model
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if run.rank is None:
        raise UserError(f"{run.method} needs a rank")
    if run.method == "lora":
        config = LoraConfig(r=run.rank, lora_alpha=run.rank, target_modules=layers)
    else:
        directions = DIRECTIONS[run.method]
        config = rosa.RosaConfig(
            r=run.rank, directions=directions, target_modules=layers, seed=run.seed
        )
    return get_peft_model(model, config)


def experiment(
    output: Path,
    *,
    models: Sequence[str] = MODELS,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 24),
    lrs: Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    epochs: int = 100,
    resample_every: int = 1,
    jobs: int = 2,
    say: Any = None,
) -> dict[str, Any]:
    """Train everything that the result file lacks; returns its content.

    Args:
        output: the folder of the result file.
        models: of `MODELS`.
        ranks: of LoRA and ROSA.
        lrs: the learning rates to choose from. None begins with `FIRST_LRS`, and for each method
            and rank goes on through `LRS` while the best rate so far is the last one tried.
        seeds: the first chooses the learning rates.
        epochs: passes over the training data.
        resample_every: epochs between ROSA's draws.
        jobs: runs at a time, each on one thread.
        say: a rich console to show progress on.

    Raises:
        ValueError: a setting is of no use, or the file is of other settings.
    """
    for name, values in (("models", models), ("ranks", ranks), ("lrs", lrs), ("seeds", seeds)):
        if values is not None and not values:
            raise UserError(f"no {name}: name at least one")
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise UserError(f"unknown model {unknown[0]!r}; there are: {', '.join(MODELS)}")
    if min(ranks) < 1 or max(ranks) > OUTPUTS:
        raise UserError(f"ranks must be from 1 to {OUTPUTS}, got {', '.join(map(str, ranks))}")
    if min(epochs, resample_every, jobs) < 1:
        raise UserError("epochs, resample-every and jobs must be at least 1")
    fixed = {"epochs": epochs, "resample_every": resample_every}
    settings = {**fixed, "lr": "falls linearly to zero"}
    path = output / RESULT
    found = runs.read_json(path) if path.is_file() else {"settings": settings, "runs": {}}
    if found.get("settings") != settings:
        raise UserError(f"{path} is of other settings ({found.get('settings')}): name a new folder")
    output.mkdir(parents=True, exist_ok=True)

    groups = [
        (model, method, rank)
        for model in models
        for method in METHODS
        for rank in ((None,) if method == "full" else ranks)
    ]
    tried = {group: tuple(lrs or FIRST_LRS) for group in groups}
    todo = [(group, lr) for group in groups for lr in tried[group]]
    while todo:
        _train_all(
            path, found, [Run(*group, lr, seeds[0], **fixed) for group, lr in todo], jobs, say
        )
        todo = []
        for group in groups if lrs is None else ():
            lr = _next_lr(tried[group], best_lr(found, group, tried[group], seeds[0]))
            if lr is not None:
                tried[group] += (lr,)
                todo.append((group, lr))
    rest = [
        Run(*group, best_lr(found, group, tried[group], seeds[0]), seed, **fixed)
        for group in groups
        for seed in seeds[1:]
    ]
    _train_all(path, found, rest, jobs, say)
    return found


def _next_lr(tried: Sequence[float], best: float) -> float | None:
    """The rate of `LRS` beyond the best one, if that is the lowest or the highest one tried."""
    if best == min(tried):
        return max((lr for lr in LRS if lr < best), default=None)
    if best == max(tried):
        return min((lr for lr in LRS if lr > best), default=None)
    return None


def _train_all(path: Path, found: dict[str, Any], todo: list[Run], jobs: int, say: Any) -> None:
    from rich.progress import track

    todo = [run for run in todo if run.name not in found["runs"]]
    if not todo:
        return
    several = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs > 1 else None
    with several or nullcontext():
        results = zip(todo, (several.map if several else map)(train, todo), strict=True)
        for run, result in track(results, "Training", len(todo), console=say):
            found["runs"][run.name] = {**asdict(run), **result}
            _write(path, found)


def _write(path: Path, found: dict[str, Any]) -> None:
    """A result file with one line per run, whole or not at all."""
    lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in found["runs"].items()]
    text = f'{{"settings": {json.dumps(found["settings"])}, "runs": {{\n'
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    os.replace(partial, path)


def best_lr(
    found: dict[str, Any], group: tuple[str, str, int | None], lrs: Sequence[float], seed: int
) -> float:
    """The rate with the lowest final validation loss; a diverged run loses."""
    rows = [r for r in _of_group(found, group) if r["seed"] == seed and r["lr"] in lrs]
    return min(rows, key=lambda r: r["validation"] if r["validation"] >= 0 else math.inf)["lr"]


def _of_group(found: dict[str, Any], group: tuple[str, str, int | None]) -> list[dict[str, Any]]:
    return [r for r in found["runs"].values() if (r["model"], r["method"], r["rank"]) == group]


def summary(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per model, method and rank: losses over all seeds at the chosen learning rate.

    `loss` is the test loss over the start's, and `over_full` over full fine-tuning's; `soon` is
    the first epoch of the mean curve at or below `SOON`, or None.
    """
    groups = dict.fromkeys((r["model"], r["method"], r["rank"]) for r in found["runs"].values())
    full: dict[str, float] = {}
    for group in sorted(groups, key=lambda g: (g[0], g[1] != "full", g[1], g[2] or 0)):
        rows = _of_group(found, group)
        counts = {lr: sum(r["lr"] == lr for r in rows) for lr in {r["lr"] for r in rows}}
        lr = best_lr(found, group, list(counts), min(r["seed"] for r in rows))
        rows = [r for r in rows if r["lr"] == lr]
        losses = [r["test"] / r["before"] for r in rows]
        model, method, rank = group
        if method == "full":
            full[model] = mean(losses)
        yield {
            "model": model,
            "method": method,
            "rank": rank,
            "lr": lr,
            "at_edge": len(counts) > 1 and lr in (min(counts), max(counts)),
            "seeds": len(losses),
            "loss": mean(losses),
            "spread": stdev(losses) if len(losses) > 1 else None,
            "over_full": mean(losses) / full[model] if full.get(model) else None,
            "soon": next((x for x, y in _curve(rows) if y <= SOON), None),
        }


COLUMNS = (
    *("method", "rank", "lr", "seeds", "loss /\nstart's", "spread", "loss /\nfull's"),
    f"epochs\nto {SOON:.0%}",
)
NOTE = (
    "Mean squared error on test data, over what it was before training and over full "
    f"fine-tuning's; epochs until the validation loss is {SOON:.0%} of the start's: means over the "
    "seeds. * The chosen learning rate is the lowest or highest of those tried."
)


def shown_rows(found: dict[str, Any], model: str) -> list[list[str]]:
    """The table of a model, as it is shown."""
    return [
        [
            str(METHODS.get(row["method"], row["method"])),  # some files have one that is no more
            "" if row["rank"] is None else str(row["rank"]),
            f"{row['lr']:g}" + ("*" if row["at_edge"] else ""),
            str(row["seeds"]),
            f"{row['loss']:.2e}",
            "" if row["spread"] is None else f"{row['spread']:.0e}",
            "" if row["over_full"] is None else f"{row['over_full']:.3g}",
            "never" if row["soon"] is None else str(row["soon"]),
        ]
        for row in summary(found)
        if row["model"] == model
    ]


def pictures(found: dict[str, Any], folder: Path) -> list[Path]:
    """The paper's figures 1 and 2: validation loss by epoch, a panel a method; means over seeds."""
    import matplotlib
    from matplotlib import pyplot
    from PIL import Image

    from rosa.bench.report.pictures import tidy  # also chooses the backend that needs no display

    written = []
    rows = list(summary(found))
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        methods = [m for m in METHODS if m != "full"]
        ranks = sorted({row["rank"] for row in mine if row["rank"]})
        colours = matplotlib.colormaps["plasma_r"]
        shades = {rank: colours(0.15 + 0.8 * i / len(ranks)) for i, rank in enumerate(ranks)}
        figure, panels = pyplot.subplots(
            1, len(methods), figsize=(3 * len(methods), 4.2), sharey=True, layout="constrained"
        )
        for axes, method in zip(panels, methods, strict=True):
            for row in sorted(mine, key=lambda row: row["rank"] or math.inf):
                if row["method"] not in (method, "full"):
                    continue
                group = model, row["method"], row["rank"]
                curve = _curve([r for r in _of_group(found, group) if r["lr"] == row["lr"]])
                style = {"color": "black", "ls": "--", "label": "full fine-tuning"}
                if row["rank"]:
                    style = {"color": shades[row["rank"]], "label": f"rank {row['rank']}"}
                axes.plot(*zip(*[(0, 1.0), *curve], strict=True), **style)
            axes.set_title(METHODS[method], fontsize=10)
            axes.set(xlabel="epoch", yscale="log")
            axes.margins(x=0)
            tidy(axes)
            axes.locator_params(axis="x", nbins=5)
        panels[0].set_ylabel("validation loss / loss at the start")
        names = {
            text: line for line, text in zip(*panels[0].get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            names.values(), names, loc="outside lower center", ncols=len(names), frameon=False
        )
        what = {"linear": "One linear layer", "mlp": "Two layers with a ReLU between"}[model]
        figure.suptitle(f"{what}, true change of rank {TRUE_RANK}")
        path = folder / f"synthetic-{model}.png"
        figure.savefig(path, dpi=90)
        pyplot.close(figure)
        with Image.open(path) as picture:
            few_colours = picture.convert("RGB").quantize(64)  # a third of the bytes
        few_colours.save(path, optimize=True)
        written.append(path)
    return written


def _curve(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Epochs, and the validation loss over the start's: the mean of several runs."""
    epochs = [epoch for epoch, _ in rows[0]["curve"]]
    curves = [[loss / row["before"] for _, loss in row["curve"]] for row in rows]
    return [(e, mean(losses)) for e, losses in zip(epochs, zip(*curves, strict=True), strict=True)]
