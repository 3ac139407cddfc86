"""How much of the loss gradient lies where a method can move, as training goes on.

    python benchmarks/energy.py --output docs/results/energy [--steps 200]

A product B A of rank r, trained, can move a weight in the directions of B's columns and of A's
rows. The share of the energy of the weight's full gradient G that lies there is

    (|P G|^2 + |G Q|^2 - |P G Q|^2) / |G|^2

with P and Q the projections onto the columns of B and the rows of A. The built-in demo task
(paragraphs of Python's documentation, ten classes) on a pretrained MiniLM; the gradient is of 64
held-out examples, summed over all adapted weights. Writes energy.json and energy.png.

Also recorded: how much of the gradient at a step lies in the r largest left, and in the r largest
right, singular directions of another batch's gradient ten steps before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback, set_seed

from rosa.bench.setup.settings import RunSettings, check
from rosa.bench.tasks.demo import model_folder
from rosa.bench.tokens.reading import longest_input
from rosa.bench.tokens.tokenizing import tokenize
from rosa.bench.train.building import adapt, load_base
from rosa.bench.train.preparing import load_task
from rosa.bench.train.trainer import build_trainer

VARIANTS = {
    "LoRA": {"method": "lora"},
    "ROSA, svd": {"directions": "svd"},
    "ROSA, orthonormal": {"directions": "orthonormal"},
    "ROSA, gradient": {"directions": "gradient"},
}


class EnergyRecorder(TrainerCallback):
    """Records the share at every tenth step."""

    def __init__(self, model: Any, batch: dict[str, Any], other: dict[str, Any], rank: int) -> None:
        self.batch, self.other, self.rank = batch, other, rank
        self.points: list[tuple[int, float]] = []
        self.lasting: list[tuple[int, float, float]] = []
        self.before: list[torch.Tensor] = []
        self.adapted = [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "r")]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % 10 == 0:
            gradients = self.gradients(kwargs["model"], self.batch)
            total = float(sum(g.square().sum() for g in gradients))
            inside = sum(
                float(energy_inside(gradient, *factors(layer)))
                for gradient, layer in zip(gradients, self.adapted, strict=True)
            )
            self.points.append((state.global_step, inside / total))
            if self.before:
                left = right = 0.0
                for gradient, before in zip(gradients, self.before, strict=True):
                    u, _, vh = torch.linalg.svd(before)
                    left += float((u[:, : self.rank].T @ gradient).square().sum())
                    right += float((gradient @ vh[: self.rank].T).square().sum())
                self.lasting.append((state.global_step, left / total, right / total))
            self.before = self.gradients(kwargs["model"], self.other)

    def gradients(self, model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
        """Of the adapted layers' weights as they stand, in evaluation mode."""
        weights = [layer.get_base_layer().weight for layer in self.adapted]
        training = model.training
        model.eval()
        for weight in weights:
            weight.requires_grad_(True)
        found = torch.autograd.grad(model(**batch).loss, weights)
        for weight in weights:
            weight.requires_grad_(False)
        model.train(training)
        return list(found)


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a ROSA or LoRA layer."""
    if hasattr(layer, "rosa_A"):
        return layer.rosa_A["default"].detach(), layer.rosa_B["default"].detach()
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def energy_inside(g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The gradient's energy in what can be moved; a factor of zeros moves nothing."""
    p = torch.linalg.qr(b).Q if b.any() else b
    q = torch.linalg.qr(a.T).Q if a.any() else a.T
    return (p.T @ g).square().sum() + (g @ q).square().sum() - (p.T @ g @ q).square().sum()


def run(settings: RunSettings, steps: int) -> dict[str, Any]:
    settings = check(settings)
    task = load_task(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    set_seed(settings.seed)
    base = load_base(settings, task, tokenizer.pad_token_id)
    rows = tokenize(settings, task, longest_input(base.model), tokenizer)
    model, _ = adapt(settings, base, lambda: [])
    trainer, _ = build_trainer(settings, task, rows, model, tokenizer)
    trainer.args.max_steps, trainer.args.eval_strategy = steps, "no"
    trainer.args.save_strategy, trainer.args.load_best_model_at_end = "no", False
    batches = [
        trainer.data_collator([rows["validation"][i] for i in range(start, start + 64)])
        for start in (0, 64)
    ]
    recorder = EnergyRecorder(model, *batches, rank=settings.rank or 0)
    trainer.add_callback(recorder)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"points": recorder.points, "lasting": recorder.lasting, "losses": losses}


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, runs in found.items():
        steps = [step for step, _ in runs[0]["points"]]
        shares = [[run["points"][i][1] for run in runs] for i in range(len(steps))]
        (line,) = axis.plot(steps, [statistics.mean(s) for s in shares], label=name)
        low, high = [min(s) for s in shares], [max(s) for s in shares]
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axis.set_xlabel("step")
    axis.set_ylabel("share of the gradient's energy that can be moved")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resample-every", default="50")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in VARIANTS.items():
            for seed in range(options.seeds):
                settings = RunSettings(
                    model=str(model_folder()),
                    output=Path(folder) / f"{len(found)}-{seed}",
                    task="demo",
                    rank=options.rank,
                    lr=options.lr,
                    max_length=28,
                    resample_every=options.resample_every,
                    seed=seed,
                    **variant,
                )
                found.setdefault(name, []).append(run(settings, options.steps))
                last = found[name][-1]
                share = statistics.mean(share for _, share in last["points"])
                left, right = (statistics.mean(p[i] for p in last["lasting"]) for i in (1, 2))
                print(
                    f"{name}, seed {seed}: mean share {share:.3f}, last loss "
                    f"{last['losses'][-1]:.3f}; lasting ten steps: left {left:.3f}, "
                    f"right {right:.3f}"
                )
    options.output.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": {k: str(v) for k, v in vars(options).items() if k != "output"},
        "variants": VARIANTS,
        "runs": found,
    }
    (options.output / "energy.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(found, options.output / "energy.png")


if __name__ == "__main__":
    main()
