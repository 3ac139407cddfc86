"""What is shipped: what a wheel and an sdist hold, and that the core needs no more than it says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

import rosa

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "peft.md").read_text("utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist."""
    place = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return place


def test_a_wheel_holds_the_package_and_nothing_else(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        held = {name for name in wheel.namelist() if not name.split("/")[0].endswith("-info")}
        (about,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        said = wheel.read(about).decode()
    source = {
        str(p.relative_to(ROOT / "src"))
        for p in (ROOT / "src" / "rosa").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert held == source
    assert "rosa/py.typed" in held
    assert f"\nVersion: {rosa.__version__}\n" in said
    assert "\nLicense-Expression: Apache-2.0\n" in said
    assert "\nRequires-Python: >=3.10\n" in said
    assert f"## [{rosa.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"version: {rosa.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_an_sdist_is_small_and_can_be_tested(built):
    (path,) = built.glob("*.tar.gz")
    assert path.stat().st_size < 2**20
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt"):
        assert name in names
    assert {"tests/conftest.py", "examples/trainer.py", "docs/results/shift.md"} <= names
    assert not [n for n in names if n.startswith("docs/results/") and n.count("/") > 2]
    assert not [n for n in names if n.startswith((".git/", ".venv", "runs"))]


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that these need, themselves too, without their extras."""
    found: dict[str, metadata.Distribution] = {}
    wanted = [Requirement(text) for text in requirements]
    while wanted:
        one = wanted.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = metadata.distribution(one.name)
        except metadata.PackageNotFoundError:  # a part that this build of another does without
            continue
        wanted += [Requirement(text) for text in found[name].requires or ()]
    return found


CORE = """
import sys, torch
from torch import nn
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, BertConfig, BertForSequenceClassification

import rosa

for absent in ("datasets", "trl", "sklearn", "matplotlib"):
    try:
        __import__(absent)
    except ImportError:
        continue
    raise SystemExit(f"{absent} is there")
config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=16)
torch.manual_seed(0)
base = BertForSequenceClassification(config)
state = {name: value.clone() for name, value in base.state_dict().items()}
model = get_peft_model(base, rosa.RosaConfig(r=2, task_type="SEQ_CLS"))
rows = [{"input_ids": torch.randint(50, (8,)), "labels": i % 2} for i in range(16)]
args = TrainingArguments(sys.argv[1], max_steps=6, report_to="none", save_strategy="no")
draws = rosa.RosaCallback(every=2)
Trainer(model, args, train_dataset=rows, callbacks=[draws]).train()
assert len(draws.drawn_at) >= 2, draws.drawn_at
model.save_pretrained(sys.argv[1])
fresh = BertForSequenceClassification(config)
fresh.load_state_dict(state)
loaded = PeftModel.from_pretrained(fresh, sys.argv[1]).eval()
ids = rows[0]["input_ids"][None]
assert torch.allclose(loaded(ids).logits, model.eval()(ids).logits, atol=1e-5)
rosa.export_merged(model, sys.argv[1] + "/plain")
print("rosa", rosa.__version__, rosa.__file__)
"""


def test_the_wheel_works_with_the_cores_requirements_alone(built, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(site)
    requirements = metadata.requires("rosa-finetune") or []
    core = closure([text for text in requirements if "extra ==" not in text])
    assert {"torch", "peft", "transformers", "accelerate"} <= core.keys()
    tops = {}
    for one in core.values():
        for file in one.files or ():
            if not file.parts[0].startswith(("..", "__pycache__")):
                tops[file.parts[0]] = Path(str(one.locate_file(file.parts[0])))
    for name, place in tops.items():
        (site / name).symlink_to(place)
    python = tmp_path / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", CORE, str(tmp_path / "out")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"rosa {rosa.__version__} {site}")
    command = [python, "-m", "rosa", "train"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'rosa-finetune[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def named_on_the_page() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", PAGE, re.M)
    return {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows}


def test_completion_finds_every_public_name():
    assert {*dir(rosa)} == {*rosa.__all__}
    assert all(hasattr(rosa, name) for name in dir(rosa))


def test_what_of_peft_is_used_is_listed():
    used: dict[str, set[str]] = {}
    for path in (ROOT / "src" / "rosa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft."):
                used.setdefault(node.module or "", set()).update(n.name for n in node.names)
    kinds = {cls for cls in subclasses(rosa.RosaLayer)} | {rosa.RosaLayer}
    for base, classes in ((BaseTuner, {rosa.RosaModel}), (BaseTunerLayer, kinds)):
        used[base.__name__] = {
            name
            for cls in classes
            for name in vars(cls)
            if hasattr(base, name) and not hasattr(object, name) and name != "_abc_impl"
            if not name.startswith("__") and not hasattr(__import__("torch").nn.Module, name)
        }
    listed = named_on_the_page()
    assert listed == used


def subclasses(cls: type) -> set[type]:
    return {each for sub in cls.__subclasses__() for each in ({sub} | subclasses(sub))}
