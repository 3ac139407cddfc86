"""`rosa train --dry-run`: what a run would train, in how many steps and how much memory."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rosa.bench.processes import join
from rosa.bench.setup.checking import RESAMPLED, check, schedule
from rosa.bench.setup.methods import own_optimizer
from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import models, runs
from rosa.bench.tasks.task import Task
from rosa.bench.tokens.tokenizing import ANSWER_IDS, lengths
from rosa.bench.train.preparing import prepare
from rosa.bench.train.trainer import steps_of

COLUMNS = ("trained", "layers", "weight", "by", "numbers")
SHOWN_DRAWS = 8


def rehearse(settings: RunSettings, resume: bool, overwrite: bool) -> tuple[list[list[str]], dict]:
    """The rows of a table of what is trained (see `COLUMNS`), and the run in numbers.

    Nothing is written, and nothing trained; raises as `rosa.bench.train.training.train` does.
    """
    settings = check(settings)
    models.check_model(settings.model)
    runs.check_output(settings.output, settings.to_json(), resume, overwrite)
    ready = prepare(settings)
    model, rows = ready.model, ready.rows["train"]
    own_optimizer(settings, model)
    epoch, steps = steps_of(settings, len(rows))
    examples = settings.batch_size * settings.gradient_accumulation * join().num_processes
    trained = [p for p in model.parameters() if p.requires_grad]
    total, learned = (sum(p.numel() for p in some) for some in (model.parameters(), trained))
    gradients = sum(p.numel() * p.element_size() for p in trained)
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    about = {
        "method": settings.method,
        "rank": "" if settings.rank is None else settings.rank,
        "training rows": len(rows),
        "longest row, tokens": max(lengths(rows)),
        "steps": f"{steps} ({epoch} an epoch, of {examples} rows)",
        "trained numbers": f"{learned:,} of {total:,} ({learned / total:.2%})",
        "weights, MiB": f"{weights / 2**20:.1f}",
        "gradients, MiB": f"{gradients / 2**20:.1f}",
        "AdamW's moments, MiB": f"{2 * gradients / 2**20:.1f}",
    }
    if settings.method in RESAMPLED:
        items = _items(rows, ready.task) * min(examples, len(rows))
        draws = schedule(settings).forecast(model, steps, epoch, items)
        shown = ", ".join(map(str, draws[:SHOWN_DRAWS]))
        more = "" if len(draws) <= SHOWN_DRAWS else f", ... ({len(draws)} in all)"
        about["draws at step"] = f"{shown}{more}" if draws else "none"
    return _layers(model), about


def _items(rows: Any, task: Task) -> float:
    """What a row is counted as: an example, or its tokens with a label."""
    if task.kind != "language":
        return 1.0
    if task.is_preference:
        return sum(len(ids) for name in ANSWER_IDS for ids in rows[name]) / len(rows)
    return sum(sum(label != -100 for label in labels) for labels in rows["labels"]) / len(rows)


def _layers(model: nn.Module) -> list[list[str]]:
    """A row for all layers that are alike but for their number."""
    found: Counter[tuple[str, str, str]] = Counter()
    numbers: Counter[tuple[str, str, str]] = Counter()
    modules: dict[str, Any] = dict(model.named_modules())
    adapted: dict[str, Any] = {n: m for n, m in modules.items() if isinstance(m, BaseTunerLayer)}
    seen: set[int] = set()
    for name, module in {**adapted, **modules}.items():
        inside = module.named_parameters(recurse=name in adapted)
        own = {n: p for n, p in inside if p.requires_grad and id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if own:
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
            weight = getattr(base, "weight", None)
            short = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name.removeprefix("base_model.model."))
            by = ", ".join(f"{_plain(n)} {_shape(p)}" for n, p in own.items())
            key = (short, "" if weight is None else _shape(weight), by)
            found[key] += 1
            numbers[key] += sum(p.numel() for p in own.values())
    return [
        [name, str(count), weight, by, f"{numbers[name, weight, by]:,}"]
        for (name, weight, by), count in found.items()
    ]


def _plain(parameter: str) -> str:
    return parameter.replace(".default", "").removesuffix(".weight")


def _shape(tensor: Any) -> str:
    return " x ".join(map(str, tensor.shape))
