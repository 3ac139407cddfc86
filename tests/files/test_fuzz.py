"""A few of the damaged folders that `make fuzz` tries by thousands, other ones every time."""

from __future__ import annotations

import secrets

import pytest

from tests.fuzzing import KINDS, tried

CASES = 30
OUTCOMES = {"UserError", "UserTypeError", "SafetensorError", "loaded"}


@pytest.mark.parametrize(("kind", "by_command"), [*((k, False) for k in KINDS), ("bert", True)])
def test_a_damaged_folder_is_refused_or_is_what_its_files_say(kind, by_command):
    counts, wrong = tried(kind, secrets.randbelow(2**30), CASES, by_command)
    assert not wrong, "\n".join(["python -m tests.fuzzing with these repeats it:", *wrong])
    assert sum(counts.values()) == CASES
    assert counts.keys() & OUTCOMES
