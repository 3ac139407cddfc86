from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import distributed

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tiny tensors: threads only get into each other's way, and with other processes on the machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_random_inputs(request: pytest.FixtureRequest) -> None:
    """New random numbers on every run; the seed is in the report of a test that fails."""
    seed = int(os.environ.get("ROSA_TEST_SEED") or secrets.randbelow(2**31))
    request.node.user_properties.append(("seed", seed))
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    """Accelerate keeps the settings of the first Accelerator for the whole process."""
    yield
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def _environment_as_found() -> Iterator[None]:
    """A rank that one test sets opens a group of processes in another, whichever comes next."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    assert not (distributed.is_available() and distributed.is_initialized())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        seed = dict(item.user_properties).get("seed")
        report.sections.append(("random inputs", f"repeat with ROSA_TEST_SEED={seed}"))
