"""`--push-to-hub`: all files arrive, and what stands in the way is said before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from rosa.bench.setup.settings import RunSettings
from rosa.bench.storage import runs
from rosa.bench.storage.saving import _command
from tests.helpers import write_csv
from tests.hub import Hub, hub
from tests.models import save_with_tokenizer, tiny_bert


@pytest.fixture
def there():
    with hub() as found:
        yield found


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_with_tokenizer(tiny_bert(), tmp_path_factory.mktemp("encoder"))


def command(url: str, *words: object, token: str = "good", offline: str = "0"):
    """A command of a user with a token, in a process of its own: the hub's address is read once."""
    home = {"HF_TOKEN": token, "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": url, "HF_HOME": "/nowhere"}
    return subprocess.run(
        [sys.executable, "-m", "rosa", *map(str, words)],
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        check=False,
    )


def training(encoder: Path, tmp_path: Path) -> list[object]:
    tmp_path.mkdir(exist_ok=True)
    data = write_csv(tmp_path / "t.csv")
    how = ["--model", encoder, "--train", data, "--epochs", 1, "--rank", 2, "--seed", 7]
    return ["train", *how, "--output", tmp_path / "run"]


def test_a_run_that_is_pushed_does_what_it_was_launched_for(
    there: Hub, encoder, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train = training(encoder, tmp_path)
    done = command(there.url, *train, "--push-to-hub", "me/launched")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["precision"] == "bf16"


def test_a_run_and_an_export_are_pushed_whole(there: Hub, encoder, tmp_path):
    train = training(encoder, tmp_path)
    done = command(there.url, *train, "--push-to-hub", "me/reviews", "--private")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {there.url}/me/reviews" in done.stdout
    adapter = tmp_path / "run/adapter"
    sent = {path: content for (name, path), content in there.files.items() if name == "me/reviews"}
    assert sent == {p.name: p.read_bytes() for p in adapter.iterdir()}
    card = sent["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    (line,) = (line for line in card.splitlines() if line.startswith("rosa train --model"))
    assert "--train t.csv --rank 2 --lr 0.001 --epochs 1.0 --max-length 128 --seed 7" in line
    assert line.endswith("--output run")
    assert str(tmp_path) not in card
    export = ["export", tmp_path / "run", "--to", "lora", "--output", tmp_path / "lora"]
    done = command(there.url, *export, "--push-to-hub", "me/lora")
    assert done.returncode == 0, done.stderr
    assert there.files["me/lora", "adapter_model.safetensors"]
    assert there.repositories == {"me/reviews": True, "me/lora": False}
    train = training(encoder, tmp_path / "other")
    done = command(there.url, *train, "--push-to-hub", "me/lora", "--private")
    assert "me/lora is there and public" in done.stderr
    done = command(there.url, *train, "--private")
    assert "--private is of a repository" in done.stderr
    done = command(there.url, *train, "--push-to-hub", "me/new", "--lr", -1)
    assert "lr must be positive" in done.stderr
    assert "me/new" not in there.repositories


@pytest.mark.parametrize(
    ("name", "how", "text"),
    [
        ("me/reviews", {"token": ""}, "needs a token of the hub: run `hf auth login`"),
        ("me/reviews", {"token": "bad"}, "Invalid user token"),
        ("other/reviews", {}, "You don't have the rights"),
        ("a/b/c", {}, "a/b/c"),
        ("me/reviews", {"offline": "1"}, "switched off by HF_HUB_OFFLINE"),
        ("me/reviews", {"url": "http://127.0.0.1:9"}, "me/reviews cannot be"),
    ],
)
def test_what_stands_in_the_way_is_said_before_training(
    there: Hub, encoder, tmp_path, name, how, text
):
    train = training(encoder, tmp_path)
    done = command(how.pop("url", there.url), *train, "--push-to-hub", name, **how)
    assert done.returncode == 2
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_pushed_is_not_lost(there: Hub, encoder, tmp_path):
    there.refuses = 507
    done = command(there.url, *training(encoder, tmp_path), "--push-to-hub", "me/reviews")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "adapter is whole, but could not be pushed" in said
    assert f"`hf upload me/reviews {tmp_path}/run/adapter` tries that again" in said
    assert (tmp_path / "run/metrics.json").is_file()


@pytest.mark.parametrize("setting", fields(RunSettings), ids=lambda setting: setting.name)
def test_a_card_names_every_setting_that_is_another_than_usual(setting):
    """Zero too, where that is not what is usual."""
    usual = runs.DEFAULTS.get(setting.name)
    option = f"--{(setting.metadata['option'] or setting.name).replace('_', '-')}"
    if setting.type.startswith("bool"):
        assert _command({setting.name: not usual}).split()[2:] == [option]
    elif setting.type.startswith("tuple"):
        assert _command({setting.name: ["a", "b"]}).split()[2:] == [option, "a", option, "b"]
    else:
        for other in {0, 7, "x"} - {usual}:
            assert _command({setting.name: other}).split()[2:] == [option, str(other)]
    assert _command({setting.name: usual}).split()[2:] == []
