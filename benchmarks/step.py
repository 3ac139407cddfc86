"""The cost of one adapted layer and of one training step, beside PEFT's LoRA in the same process.

    python benchmarks/step.py [--rounds 15] [--output step.json]

Prints the median of ROSA's time over LoRA's, with the quartiles over the rounds. The rounds of the
two alternate, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from rosa import RosaConfig

RANK = 8


def configs(**options):
    rosa = RosaConfig(r=RANK, directions="orthonormal", **options)
    return {"rosa": rosa, "lora": LoraConfig(r=RANK, lora_alpha=2 * RANK, **options)}


def layer_forward():
    """The forward pass of a 768 x 768 layer on 1,024 tokens, without gradients."""
    x = torch.randn(16, 64, 768)
    jobs = {}
    for name, config in configs(target_modules=["0"]).items():
        model = get_peft_model(nn.Sequential(nn.Linear(768, 768)), config).eval()

        def job(model=model):
            with torch.no_grad():
                for _ in range(20):
                    model(x)

        jobs[name] = job
    return jobs


def training_step():
    """Forward, backward and AdamW of RoBERTa-base's shapes, 4 of 12 layers, batch 16 x 64."""
    shape = BertConfig(num_hidden_layers=4)
    ids, labels = torch.randint(1000, (16, 64)), torch.randint(2, (16,))
    jobs = {}
    targets = ["query", "key", "value", "attention.output.dense"]
    for name, config in configs(target_modules=targets, task_type="SEQ_CLS").items():
        model = get_peft_model(BertForSequenceClassification(shape), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def job(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()

        jobs[name] = job
    return jobs


def measure(jobs, rounds):
    times = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {}
    for benchmark in (layer_forward, training_step):
        torch.manual_seed(0)
        times = measure(benchmark(), options.rounds)
        ratios = [r / p for r, p in zip(times["rosa"], times["lora"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[benchmark.__name__] = {"ratio": middle, "quartiles": [low, high], "seconds": times}
        print(f"{benchmark.__doc__}")
        for name, values in times.items():
            print(f"  {name}: median {1000 * statistics.median(values):.1f} ms")
        print(f"  rosa / lora: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    if options.output:
        packages = {name: version(name) for name in ("torch", "peft", "transformers")}
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        }
        record = {"machine": machine, "packages": packages, "rank": RANK, "results": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
