"""Help that fits a screen, and hides nothing for good; settings of a method's config."""

from __future__ import annotations

import json
import re

import pytest
from peft import PeftConfig
from safetensors.torch import load_file
from typer.main import get_command

from rosa.cli.commands import app
from tests.helpers import fails, run, write_csv
from tests.models import save_with_tokenizer, tiny_bert

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def shown(capsys, *arguments: str) -> str:
    run(*arguments)
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _screen(monkeypatch) -> None:
    for name, size in (("COLUMNS", "80"), ("TERMINAL_WIDTH", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, size)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_all_of_it_can_be_asked_for(capsys, command):
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    options = {each.opts[0]: each.hidden for each in parameters if each.opts[0].startswith("--")}
    short = shown(capsys, command, "--help")
    assert len(short.splitlines()) < 60
    assert max(map(len, short.splitlines())) <= 80
    everything = shown(capsys, command, "--help-all")
    for option, hidden in options.items():
        name = re.compile(rf"{option}\b(?!-)")
        assert name.search(everything)
        assert hidden or name.search(short)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_file_of_its_options(capsys, tmp_path, command):
    (tmp_path / "c.yaml").write_text("no-such-option: 1\nnor_this: 2\n")
    config = ["--config", tmp_path / "c.yaml"]
    said = " ".join(fails(capsys, command, *config).split())
    assert "not among the options of this command: 'no_such_option', 'nor_this'" in said
    (tmp_path / "c.yaml").write_text("- 1\n")
    assert "holds no options" in fails(capsys, command, *config)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    assert "is not YAML" in fails(capsys, command, *config)
    assert "is not there" in fails(capsys, command, "--config", tmp_path / "none.yaml")


@pytest.mark.parametrize("line", ["seed: one", "steps: 1.5", "lr: fast"])
def test_a_wrong_value_in_a_file_is_told_with_the_file(basics, tmp_path, capsys, line):
    (tmp_path / "c.yaml").write_text(line + "\n")
    said = fails(capsys, "train", *basics, "--config", tmp_path / "c.yaml")
    assert f"c.yaml: {line.partition(':')[0]}: Input should be a valid" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [m]", "model takes one value, got ['m']"),
        ("precision: no", "precision takes one value, got False: quote a word"),
        ("rank: true", "rank takes one value, got True"),
        ("lr: {a: 1}", "lr takes one value, got {'a': 1}"),
        ("batch_size: 4\nbatch-size: 2", "has batch_size twice"),
    ],
)
def test_a_value_of_another_kind_is_told_with_the_file(basics, tmp_path, capsys, content, said):
    (tmp_path / "c.yaml").write_text(content + "\n")
    told = fails(capsys, "train", *basics, "--config", tmp_path / "c.yaml")
    assert f"c.yaml: {said}" in told or f"c.yaml {said}" in told


def test_several_values_may_be_a_list_and_null_is_no_value(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "methods: [rosa, no_such]\nmodel: m\nranks: [2, 4]\nseeds: null\n"
    )
    said = fails(capsys, "compare", "--config", tmp_path / "c.yaml", "--output", tmp_path / "o")
    assert "unknown method 'no_such'" in said


def test_what_a_file_says_is_taken_and_what_is_given_wins(basics, tmp_path, capsys):
    run("train", *basics, "--rank", 2)
    (tmp_path / "c.yaml").write_text(
        f"folder: {tmp_path / 'run'}\nto: lora\noutput: {tmp_path / 'lora'}\nrank: 1\n"
    )
    run("export", "--config", tmp_path / "c.yaml")
    assert PeftConfig.from_pretrained(tmp_path / "lora").r == 1  # type: ignore[attr-defined]
    more = ["--rank", 2, "--output", tmp_path / "other"]
    run("export", "--config", tmp_path / "c.yaml", *more)
    assert PeftConfig.from_pretrained(tmp_path / "other").r == 2  # type: ignore[attr-defined]


def test_defaults_are_told(capsys):
    said = " ".join(shown(capsys, "train", "--help").replace("│", "").split())
    for text in ("a hub id or a folder. (required)", "(default: 32)", "random. (default: 0)"):
        assert text in said


@pytest.fixture
def basics(tmp_path):
    encoder = save_with_tokenizer(tiny_bert(), tmp_path / "encoder")
    data = write_csv(tmp_path / "t.csv")
    return ["--model", encoder, "--train", data, "--epochs", 1, "--output", tmp_path / "run"]


CASES = {
    "rosa": {"rosa_dropout": 0.25, "bias": "all", "rank_pattern": {"query": 3}},
    "lora": {"use_dora": True, "lora_dropout": 0.5},
    "hira": {"hira_dropout": 0.5},
}


@pytest.mark.parametrize("method", CASES)
def test_a_methods_own_settings_can_be_given(basics, tmp_path, method):
    wanted = CASES[method]
    more = [word for name, v in wanted.items() for word in ("--set", f"{name}={json.dumps(v)}")]
    run("train", *basics, "--method", method, "--rank", 2, *more)
    found = PeftConfig.from_pretrained(tmp_path / "run/adapter")
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert found.r == 2  # type: ignore[attr-defined]


def test_what_has_an_option_of_its_own_is_that_option(basics, tmp_path):
    more = ["--set", "directions=svd", "--set", "alpha=5", "--set", "resample_every=3"]
    run("train", *basics, *more, "--set", "seed=9")
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["directions"], settings["alpha"]) == ("svd", 5.0)
    assert (settings["resample_every"], settings["set"]) == ("3", ["seed=9"])
    config = PeftConfig.from_pretrained(tmp_path / "run/adapter")
    assert (config.directions, config.alpha, config.seed) == ("svd", 5.0, 9)  # type: ignore[attr-defined]


def test_layers_by_their_number(basics, tmp_path):
    more = ["--target-modules", "query", "--set", "layers_to_transform=[0]"]
    run("train", *basics, *more)
    names = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    layers = {name.split(".layer.")[1][0] for name in names if "rosa_A" in name}
    assert layers == {"0"}


def test_in_a_file_settings_are_names_with_values(basics, tmp_path):
    (tmp_path / "c.yaml").write_text("set: {bias: all, rosa_dropout: 0.5}\ntarget_modules: query\n")
    run("train", *basics, "--config", tmp_path / "c.yaml")
    config = PeftConfig.from_pretrained(tmp_path / "run/adapter")
    assert (config.bias, config.rosa_dropout) == ("all", 0.5)  # type: ignore[attr-defined]
    more = ["--config", tmp_path / "c.yaml", "--ranks", 2, "--lrs", 1e-3, "--seeds", 0]
    run("compare", *basics[:-1], tmp_path / "compared", *more)
    (cell,) = (tmp_path / "compared").glob("rosa+*")
    config = PeftConfig.from_pretrained(cell / "adapter")
    assert (config.bias, config.rosa_dropout) == ("all", 0.5)  # type: ignore[attr-defined]


BAD = {
    "no value": (["--set", "bias"], "--set bias: not name=value with a setting of RosaConfig"),
    "no setting": (["--set", "use_dora=true"], "with a setting of RosaConfig; there are: "),
    "a file's": (["--set", "inference_mode=true"], "with a setting of RosaConfig"),
    "a fingerprint": (["--set", "base_fingerprint={}"], "with a setting of RosaConfig"),
    "a config": (["--method", "lora", "--set", "loftq_config=3"], "a setting of LoraConfig"),
    "no bool": (["--method", "lora", "--set", "use_rslora=maybe"], "use_rslora is true or false"),
    "layers": (["--set", "layers_to_transform=[0]"], "is for layers that are named by the last"),
    "its own option": (["--set", "r=3"], "with a setting of RosaConfig"),
    "no YAML": (["--set", "bias={"], "'{' is not YAML"),
    "a wrong value": (["--set", "bias=some"], "bias"),
    "a wrong type": (["--set", "rosa_dropout=much"], "rosa_dropout"),
    "a word for a number": (["--set", "alpha=much"], "--set alpha=much takes float"),
    "full": (["--method", "full", "--set", "bias=all"], "method full has none"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_are_none_are_refused_before_any_work(basics, tmp_path, capsys, case):
    more, text = BAD[case]
    assert text in fails(capsys, "train", *basics, *more)
    assert not (tmp_path / "run").exists()
