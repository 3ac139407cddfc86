"""E2E's scores beside the challenge's own scorer, on its examples and on 200 rows of real data.

    python benchmarks/e2e_scores.py SCORER TESTSET [--output e2e-scores.json]

SCORER is a checkout of tuetschek/e2e-metrics whose requirements are installed, TESTSET the
challenge's testset_w_refs.csv. For the real data one reference of each meaning representation,
drawn with seed 0, is scored against the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rosa.bench.tasks.generation_metrics import e2e_scores

NAMES = {"BLEU": "bleu", "NIST": "nist", "METEOR": "meteor", "ROUGE_L": "rouge_l", "CIDEr": "cider"}


def judge(scorer: Path, outputs: list[str], references: list[list[str]], *options: str):
    with tempfile.TemporaryDirectory() as folder:
        ref, out = Path(folder, "ref.txt"), Path(folder, "out.txt")
        ref.write_text("\n\n".join("\n".join(texts) for texts in references) + "\n", "utf-8")
        out.write_text("\n".join(outputs) + "\n", "utf-8")
        command = [sys.executable, "measure_scores.py", *options, str(ref), str(out)]
        printed = subprocess.run(command, cwd=scorer, capture_output=True, text=True, check=True)
    found = re.findall(r"^(\w+): ([0-9.]+)$", printed.stdout, re.MULTILINE)
    return {NAMES[name]: float(value) for name, value in found}


def examples(scorer: Path) -> tuple[list[str], list[list[str]]]:
    folder = scorer / "example-inputs"
    outputs = (folder / "baseline-output.txt").read_text("utf-8").split("\n")
    blocks = re.split(r"\n\s*\n", (folder / "devel-conc.txt").read_text("utf-8").strip())
    return [line.strip() for line in outputs if line.strip()], [b.split("\n") for b in blocks]


def real(testset: Path) -> tuple[list[str], list[list[str]]]:
    references: dict[str, list[str]] = {}
    with testset.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"])
    generator = random.Random(0)
    chosen = [list(texts) for texts in references.values() if len(texts) > 2][:200]
    return [texts.pop(generator.randrange(len(texts))) for texts in chosen], chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scorer", type=Path)
    parser.add_argument("testset", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name, data in (("example", examples(arguments.scorer)), ("real", real(arguments.testset))):
        results[name] = {
            "inputs": len(data[0]),
            "ours": e2e_scores(*data),
            "judge": judge(arguments.scorer, *data),
            "judge in Python (-p)": judge(arguments.scorer, *data, "-p"),
        }
        for who, scores in results[name].items():
            print(name, who, scores)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
