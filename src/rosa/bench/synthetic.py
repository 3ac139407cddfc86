"""`rosa synthetic`: the paper's regression, where the true change of the weights has a known rank.

A linear layer 512 -> 32, or two with 64 hidden units and a ReLU between, is to become itself plus
a change of rank 24 in every layer, from 5,000 examples. LoRA below that rank cannot; ROSA and full
fine-tuning can (Abdel Hameed et al., 2024, figures 1 and 2).

The comparison itself is that of `rosa compare`: the same cells, tuning and reports. A run is a
plain loop, since a step takes a fraction of a millisecond: Adam, at a rate that falls linearly to
zero. Its losses are over what they were before training: on validation data for the choice of the
rate, on test data for the report. The seed makes the problem too.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rosa.bench.grid.cell import Kind, Told
from rosa.bench.grid.grid import Grid
from rosa.bench.processes import peak_memory_mib
from rosa.bench.setup.checking import RESAMPLED, schedule
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import runs
from rosa.bench.storage.record import Record
from rosa.bench.train.building import Base, adapt
from rosa.errors import UserError

if TYPE_CHECKING:
    from torch import nn

MODELS = ("linear", "mlp")
VARIANTS = "lora,rosa+directions=svd,rosa+directions=orthonormal,rosa,full"
LRS = "1e-2,3e-2,1e-1"
RANKS = (1, 4, 24)
METHODS = ("rosa", "relora", "lora", "rslora", "pissa", "dora", "targets", "full")
"""Those that are no more than their adapter: the others ask something of the Trainer."""
OPTIONS = ("alpha", "directions", "trained", "resample_every", "moments", "first_draw", "set")
"""Settings that variants may have."""
INPUTS, HIDDEN, OUTPUTS, TRUE_RANK = 512, 64, 32, 24
EXAMPLES = {"train": 5000, "validation": 1000, "test": 1000}
BATCH, POINTS = 64, 50
"""Examples of a step, and points of a run's curve at most."""
SHOWN = 4
"""Batches that a draw by the gradient is shown."""

Data = dict[str, dict[str, Any]]
"""By part the inputs `x`, (examples, 512), and the true outputs `labels`, (examples, 32)."""


def settings_for(model: str, given: RunSettings) -> RunSettings:
    """What the cells of a comparison on one of `MODELS` share, in a folder below that given.

    Raises:
        UserError: there is no such model.
    """
    if model not in MODELS:
        raise UserError(f"unknown model {model!r}; there are: {', '.join(MODELS)}")
    return replace(
        given,
        model=model,
        output=given.output / model,
        task="synthetic",
        target_modules=("layers.0",) if model == "linear" else ("layers.0", "layers.2"),
        batch_size=BATCH,
        warmup=0.0,
        record_changes=True,
    )


def check_grid(grid: Grid) -> None:
    """Raise UserError for methods and ranks that the regression cannot have."""
    for variant in grid.variants:
        if variant.method not in METHODS:
            raise UserError(
                f"the regression trains no {variant.method}; its methods are: {', '.join(METHODS)}"
            )
        if unknown := variant.options.keys() - set(OPTIONS):
            raise UserError(
                f"{variant.name}: the regression's variants differ in {', '.join(OPTIONS)}, not in "
                f"{min(unknown)}"
            )
    if not 1 <= min(grid.ranks) <= max(grid.ranks) <= OUTPUTS:
        ranks = ", ".join(map(str, grid.ranks))
        raise UserError(f"ranks must be from 1 to {OUTPUTS}, got {ranks}")


def train(settings: RunSettings, variant: str, told: Told) -> Record:
    """Train one cell; see `grid.cell.Kind`."""
    import torch
    from transformers import TrainerState

    settings.output.mkdir(exist_ok=True)
    runs.write_json(settings.output / runs.SETTINGS, settings.to_json())
    torch.manual_seed(settings.seed)
    start, data = problem(settings.model)
    before = {part: _loss(start, rows) for part, rows in data.items()}

    def batches(examples: int | None = None) -> Iterator[dict[str, Any]]:
        for chosen in torch.randperm(EXAMPLES["train"])[:examples].split(settings.batch_size):
            yield {name: values[chosen] for name, values in data["train"].items()}

    def some() -> Iterator[dict[str, Any]]:
        return batches(SHOWN * settings.batch_size)

    model, recorder = adapt(settings, Base(copy.deepcopy(start), [], None), some)
    epochs, epoch_steps = round(settings.epochs), -(-EXAMPLES["train"] // settings.batch_size)
    steps = epochs * epoch_steps
    draws = _Draws(settings.moments, some)
    if settings.method in RESAMPLED:
        draws.planned = schedule(settings).forecast(model, steps, epoch_steps, settings.batch_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=settings.lr)  # type: ignore[arg-type]
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    history: list[dict[str, Any]] = []
    state = TrainerState()
    begin = time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in batches():
            draws.make(state.global_step, model, optimizer)
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            losses.append(loss.detach())
            state.global_step += 1
        told(epoch / epochs)
        if epoch * POINTS // epochs > (epoch - 1) * POINTS // epochs:
            found = _loss(model, data["validation"]) / before["validation"]
            if not math.isfinite(found):
                raise UserError(f"the training has diverged at --lr {settings.lr:g}: lower it")
            mean = float(torch.stack(losses).mean()) / before["train"]
            point = {"epoch": epoch, "step": state.global_step, "train_loss": _short(mean)}
            history.append({**point, "eval_loss": _short(found)})
            state.epoch = epoch
            recorder.on_evaluate(None, state, None, model=model)
    recorder.on_train_end(None, state, None, model=model)
    record = Record(
        variant=variant,
        method=settings.method,
        rank=settings.rank,
        lr=settings.lr,  # type: ignore[arg-type]  # `check` has chosen one
        seed=settings.seed,
        metric="loss",
        reported="test_loss",
        scores={
            "eval_loss": history[-1]["eval_loss"],
            "loss": history[-1]["eval_loss"],
            "test_loss": _short(_loss(model, data["test"]) / before["test"]),
        },
        train_loss=history[-1]["train_loss"],
        epochs=epochs,
        steps=steps,
        train_seconds=time.perf_counter() - begin,
        resamples=len(draws.made),
        resample_seconds=draws.seconds,
        trainable_parameters=sum(p.numel() for p in trained),
        peak_memory_mib=peak_memory_mib(),
        train_examples=EXAMPLES["train"],
        validation_examples=EXAMPLES["validation"],
        test_examples=EXAMPLES["test"],
        adapter_bytes=0,
    )
    changes = {"epochs": recorder.epochs, "spectra": recorder.spectra}
    content = {"steps": [], "epochs": history, "drawn_at": draws.made, "changes": changes}
    runs.write_json(settings.output / runs.HISTORY, content)
    record.write(settings.output)
    return record


@dataclass
class _Draws:
    """The draws of a run.

    Attributes:
        moments: see `rosa.resample`.
        batches: what the first draw is shown, which may follow the gradient.
        planned: the steps that begin with one.
        made: those that did.
        seconds: that they took.
    """

    moments: str
    batches: Callable[[], Iterator[dict[str, Any]]]
    planned: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def make(self, step: int, model: Any, optimizer: Any) -> None:
        """Draw, if the step begins with it."""
        import rosa

        if step not in self.planned[len(self.made) : len(self.made) + 1]:
            return
        begin = time.perf_counter()
        shown = () if self.made else self.batches()
        rosa.resample(model, optimizer, moments=self.moments, batches=shown)
        self.seconds += time.perf_counter() - begin
        self.made.append(step)


def _check(base: RunSettings) -> None:
    """What could be wrong, `settings_for` and `check_grid` have said."""


KIND = Kind(_check, train)


def problem(model: str) -> tuple[nn.Module, Data]:
    """The model to start from, and data of the true model: drawn from torch's global generator."""
    import torch
    from torch import nn

    class Regression(nn.Module):
        """Takes inputs, and gives the mean squared error where it is given the true outputs."""

        def __init__(self, sizes: list[int]) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise(sizes):
                layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
            self.layers = nn.Sequential(*layers[:-1])

        def forward(self, x: Any, labels: Any = None) -> Any:
            logits = self.layers(x)
            loss = None if labels is None else nn.functional.mse_loss(logits, labels)
            return SimpleNamespace(logits=logits, loss=loss)

    start = Regression([INPUTS, OUTPUTS] if model == "linear" else [INPUTS, HIDDEN, OUTPUTS])
    true = copy.deepcopy(start)
    data = {}
    with torch.no_grad():
        for weight in true.parameters():
            out, inputs = weight.shape
            weight += torch.randn(out, TRUE_RANK) @ torch.randn(TRUE_RANK, inputs)
        for part, count in EXAMPLES.items():
            x = torch.randn(count, INPUTS)
            data[part] = {"x": x, "labels": true(x).logits}
    return start, data


def _loss(model: Any, rows: dict[str, Any]) -> float:
    import torch

    with torch.no_grad():
        return float(model(**rows).loss)


def _short(loss: float) -> float:
    return float(f"{loss:.4g}")  # more digits would only make a long file
