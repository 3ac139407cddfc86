"""`accelerate launch rosa train`: what it is set up for is what the run does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rosa.bench.processes import join
from rosa.bench.setup.launched import as_launched
from rosa.bench.setup.settings import RunSettings
from rosa.errors import UserError
from tests.helpers import save_with_tokenizer, write_csv
from tests.models import tiny_bert
from tests.processes import free_port, without_gloo

SETTINGS = RunSettings(model="x", output=Path("y"), task="cola")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}
PRECISION = "ACCELERATE_MIXED_PRECISION"
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


@pytest.fixture
def launch(monkeypatch):
    """The settings of a run under a launcher's environment."""

    def launched(environment, **given):
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return as_launched(RunSettings(**{**vars(SETTINGS), **given}))

    return launched


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {}, {}),
        (FSDP, {}, {"fsdp": True}),
        (FSDP, {"fsdp": True}, {"fsdp": True}),
        (ZERO, {}, {"deepspeed": Path("zero.json")}),
        (ZERO, {"deepspeed": Path("zero.json")}, {"deepspeed": Path("zero.json")}),
        (ZERO, {"deepspeed": Path.cwd() / "zero.json"}, {"deepspeed": Path("zero.json")}),
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none", ACCUMULATION: "auto"},
            {},
            {"deepspeed": Path("zero.json")},
        ),
        ({ACCUMULATION: "8"}, {"gradient_accumulation": 8}, {"gradient_accumulation": 8}),
        ({PRECISION: "no"}, {}, {"precision": "auto"}),
        ({PRECISION: "no"}, {"precision": "bf16"}, {"precision": "bf16"}),
        ({PRECISION: "bf16"}, {}, {"precision": "bf16"}),
        ({PRECISION: "bf16"}, {"precision": "bf16"}, {"precision": "bf16"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, {}, {}),
    ],
    ids=str,
)
def test_it_is_taken_for_the_runs_own(launch, environment, given, expected):
    settings = launch(environment, **given)
    assert {name: getattr(settings, name) for name in expected} == expected
    left = {name for name in environment if name in os.environ}
    assert left <= {"ACCELERATE_DYNAMO_BACKEND"}  # or Accelerate would read it again
    assert as_launched(settings) == settings


@pytest.mark.parametrize(
    ("environment", "given", "says"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, {}, "set fsdp_version: 2"),
        ({**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "set fsdp_state_dict_type"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "set fsdp_offload_params: false"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "set fsdp_activation_checkpoint"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "set fsdp_auto_wrap_policy"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, {}, "which is FSDP 1's"),
        ({**FSDP, "FSDP_IGNORED_MODULES": "lm_head"}, {}, "fsdp_ignored_modules"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "set fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "deepspeed_config_file"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "zero_stage beside it"),
        ({**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "gradient_clipping beside it"),
        (
            {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            {},
            "offload_param_device beside it",
        ),
        ({ACCUMULATION: "8"}, {}, "gradient_accumulation_steps 8"),
        ({ACCUMULATION: "8"}, {"gradient_accumulation": 2}, "--gradient-accumulation 2"),
        (ZERO, {"deepspeed": Path("other.json")}, "leave one of them out"),
        ({PRECISION: "fp16"}, {}, "mixed_precision fp16"),
        ({PRECISION: "bf16"}, {"precision": "fp32"}, "--precision fp32: launch it with"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "a dynamo backend"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "a parallelism config"),
    ],
    ids=str,
)
def test_what_is_not_done_is_refused(launch, environment, given, says):
    with pytest.raises(UserError, match=re.escape(says)):
        launch(environment, **given)


def test_processes_that_do_not_say_how_many_they_are(monkeypatch):
    monkeypatch.setattr("accelerate.PartialState", lambda **_: SimpleNamespace(num_processes=2))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="as mpirun: start them by torchrun"):
        join()


@without_gloo
@pytest.mark.parametrize("by", ["deepspeed", "plain"])
def test_by_the_launcher_itself(tmp_path, by):
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": free_port(),
    }
    if by == "deepspeed":
        pytest.importorskip("deepspeed")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles on the CPU")
        zero = tmp_path / "zero.json"
        zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        config |= {"distributed_type": "DEEPSPEED", "mixed_precision": "no"}
        config |= {"deepspeed_config": {"deepspeed_config_file": str(zero)}}
        expected = {"deepspeed": str(zero), "precision": "auto"}
    else:
        config |= {"distributed_type": "NO", "num_processes": 1}  # on CPUs it starts one
        config |= {"use_cpu": True, "mixed_precision": "bf16"}
        expected = {"deepspeed": None, "precision": "bf16"}
    file = tmp_path / "accelerate.yaml"
    file.write_text(json.dumps(config))  # which YAML reads
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["-m", "rosa", "train", "--output", str(tmp_path / "run"), "--train"]
    command += [str(write_csv(tmp_path / "train.csv")), "--model"]
    command += [str(save_with_tokenizer(tiny_bert(), tmp_path / "base")), "--epochs", "1"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert {name: settings[name] for name in expected} == expected
    assert settings["processes"] == config["num_processes"]
    assert found.stdout.count("adapter_bytes") == 1  # one table
