"""`rosa synthetic`: the paper's regression, where the true change of the weights has a known rank.

A linear layer 512 -> 32, or two with 64 hidden units and a ReLU between, is to become itself plus
a change of rank 24 in every layer, from 5,000 examples. LoRA below that rank cannot; ROSA and full
fine-tuning can (Abdel Hameed et al., 2024, figures 1 and 2).

The learning rate of each method and rank is chosen with the first seed, as the one with the lowest
final validation loss; what is reported is the loss on other data, the test set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rosa import runs

MODELS = ("linear", "mlp")
METHODS = {
    "lora": "LoRA",
    "rosa": "ROSA, singular directions",
    "rosa-orthonormal": "ROSA, random directions",
    "rosa-gradient": "ROSA, gradient directions",
    "full": "full fine-tuning",
}
INPUTS, HIDDEN, OUTPUTS, TRUE_RANK = 512, 64, 32, 24
EXAMPLES = {"train": 5000, "validation": 1000, "test": 1000}
RESULT = "synthetic.json"


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
    """Train one run; returns the losses on validation by epoch, and at the end on test."""
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
    losses = []
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
        with torch.no_grad():
            losses.append(float(mse_loss(model(data["validation"][0]), data["validation"][1])))
    with torch.no_grad():
        test = float(mse_loss(model(data["test"][0]), data["test"][1]))
        before = float(mse_loss(start(data["test"][0]), data["test"][1]))
    trained = sum(p.numel() for p in factors)
    return {"validation": losses, "test": test, "before": before, "trainable_parameters": trained}


def _draws(run: Run, epoch: int) -> bool:
    """Whether subspaces are drawn at the begin of an epoch; by the gradient, at the first too."""
    first = 0 if run.method == "rosa-gradient" else run.resample_every
    return run.method.startswith("rosa") and epoch >= first and epoch % run.resample_every == 0


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
        raise ValueError(f"{run.method} needs a rank")
    if run.method == "lora":
        config = LoraConfig(r=run.rank, lora_alpha=run.rank, target_modules=layers)
    else:
        directions = run.method.partition("-")[2] or "svd"
        config = rosa.RosaConfig(
            r=run.rank, directions=directions, target_modules=layers, seed=run.seed
        )
    return get_peft_model(model, config)


def experiment(
    output: Path,
    *,
    models: Sequence[str] = MODELS,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 24),
    lrs: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    epochs: int = 100,
    resample_every: int = 4,
    jobs: int = 2,
    say: Any = None,
) -> dict[str, Any]:
    """Train everything that the result file lacks; returns its content.

    Raises:
        ValueError: a setting is of no use, or the file is of other settings.
    """
    for name, values in (("models", models), ("ranks", ranks), ("lrs", lrs), ("seeds", seeds)):
        if not values:
            raise ValueError(f"no {name}: name at least one")
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        raise ValueError(f"unknown model {unknown[0]!r}; there are: {', '.join(MODELS)}")
    if min(ranks) < 1 or max(ranks) > OUTPUTS:
        raise ValueError(f"ranks must be from 1 to {OUTPUTS}, got {', '.join(map(str, ranks))}")
    if min(epochs, resample_every, jobs) < 1:
        raise ValueError("epochs, resample-every and jobs must be at least 1")
    fixed = {"epochs": epochs, "resample_every": resample_every}
    path = output / RESULT
    found = runs.read_json(path) if path.is_file() else {"settings": fixed, "runs": {}}
    if found.get("settings") != fixed:
        raise ValueError(
            f"{path} is of other settings ({found.get('settings')}): name a new folder"
        )
    output.mkdir(parents=True, exist_ok=True)

    groups = [
        (model, method, rank)
        for model in models
        for method in METHODS
        for rank in ((None,) if method == "full" else ranks)
    ]
    tuning = [Run(*group, lr, seeds[0], **fixed) for group in groups for lr in lrs]
    _train_all(path, found, tuning, jobs, say)
    rest = [
        Run(*group, best_lr(found, group, lrs, seeds[0]), seed, **fixed)
        for group in groups
        for seed in seeds[1:]
    ]
    _train_all(path, found, rest, jobs, say)
    return found


def _train_all(path: Path, found: dict[str, Any], todo: list[Run], jobs: int, say: Any) -> None:
    from rich.progress import track

    todo = [run for run in todo if run.name not in found["runs"]]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = zip(todo, pool.map(train, todo), strict=True)
        for run, result in track(results, "Training", len(todo), console=say):
            found["runs"][run.name] = {**asdict(run), **result}
            runs.write_json(path, found)


def best_lr(
    found: dict[str, Any], group: tuple[str, str, int | None], lrs: Sequence[float], seed: int
) -> float:
    """The rate with the lowest final validation loss; a diverged run loses."""
    rows = [r for r in _of_group(found, group) if r["seed"] == seed and r["lr"] in lrs]
    return min(rows, key=lambda r: r["validation"][-1] if r["validation"][-1] >= 0 else 1e99)["lr"]


def _of_group(found: dict[str, Any], group: tuple[str, str, int | None]) -> list[dict[str, Any]]:
    return [r for r in found["runs"].values() if (r["model"], r["method"], r["rank"]) == group]


def summary(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per model, method and rank: test loss over all seeds at the chosen learning rate."""
    groups = dict.fromkeys((r["model"], r["method"], r["rank"]) for r in found["runs"].values())
    full: dict[str, float] = {}
    for group in sorted(groups, key=lambda g: (g[0], g[1] != "full", g[1], g[2] or 0)):
        rows = _of_group(found, group)
        counts = {lr: sum(r["lr"] == lr for r in rows) for lr in {r["lr"] for r in rows}}
        lr = best_lr(found, group, list(counts), min(r["seed"] for r in rows))
        losses = [r["test"] / r["before"] for r in rows if r["lr"] == lr]
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
        }


COLUMNS = ("method", "rank", "lr", "seeds", "loss / start's", "spread", "loss / full's")
NOTE = (
    "Mean squared error on test data, over what it was before training and over full "
    "fine-tuning's: means over the seeds; * the chosen learning rate is at the edge of those tried."
)


def shown_rows(found: dict[str, Any], model: str) -> list[list[str]]:
    """The table of a model, as it is shown."""
    return [
        [
            METHODS[row["method"]],
            "" if row["rank"] is None else str(row["rank"]),
            f"{row['lr']:g}" + ("*" if row["at_edge"] else ""),
            str(row["seeds"]),
            f"{row['loss']:.2e}",
            "" if row["spread"] is None else f"{row['spread']:.0e}",
            "" if row["over_full"] is None else f"{row['over_full']:.3g}",
        ]
        for row in summary(found)
        if row["model"] == model
    ]


def pictures(found: dict[str, Any], folder: Path) -> list[Path]:
    """The paper's figures 1 and 2: validation loss by epoch, a panel a method; means over seeds."""
    import matplotlib
    from matplotlib import pyplot

    from rosa.pictures import tidy  # also chooses the backend that needs no display

    written = []
    rows = list(summary(found))
    for model in dict.fromkeys(row["model"] for row in rows):
        methods = [m for m in METHODS if m != "full"]
        figure, panels = pyplot.subplots(1, len(methods), figsize=(12, 4), sharey=True)
        full = next(r for r in rows if r["model"] == model and r["method"] == "full")
        ranks = sorted({r["rank"] for r in rows if r["rank"]})
        colours = matplotlib.colormaps["viridis_r"]
        for axes, method in zip(panels, methods, strict=True):
            for row in (r for r in rows if r["model"] == model and r["method"] == method):
                shade = colours((ranks.index(row["rank"]) + 1) / len(ranks))
                axes.plot(_curve(found, row), color=shade, label=f"rank {row['rank']}")
            axes.plot(_curve(found, full), color="black", ls="--", label="full fine-tuning")
            axes.set(title=METHODS[method], xlabel="epoch", yscale="log")
            tidy(axes)
        panels[0].set_ylabel("validation loss, of the start's")
        panels[0].legend(frameon=False, fontsize=8)
        what = {"linear": "One linear layer", "mlp": "Two layers with a ReLU between"}[model]
        figure.suptitle(f"{what}, true change of rank {TRUE_RANK}")
        figure.tight_layout()
        path = folder / f"synthetic-{model}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def _curve(found: dict[str, Any], row: dict[str, Any]) -> list[float]:
    group = row["model"], row["method"], row["rank"]
    rows = [r for r in _of_group(found, group) if r["lr"] == row["lr"]]
    curves = [[loss / r["before"] for loss in r["validation"]] for r in rows]
    return [mean(losses) for losses in zip(*curves, strict=True)]
