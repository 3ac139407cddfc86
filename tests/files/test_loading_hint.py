"""A saved folder says how to load it where PEFT does not know ROSA."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import pytest
from peft import PeftConfig, PeftModel, get_peft_model

from rosa import RosaConfig
from tests.models import Mlp


def save(folder):
    base = Mlp()
    model = get_peft_model(copy.deepcopy(base), RosaConfig(r=2, target_modules=["first"]))
    model.save_pretrained(folder)
    return model, base


def test_config_and_card_say_that_rosa_must_be_imported(tmp_path):
    _, base = save(tmp_path)
    assert "import rosa" in json.loads((tmp_path / "adapter_config.json").read_text())["loading"]
    card = (tmp_path / "README.md").read_text()
    assert "pip install rosa-finetune" in card
    assert card.count("import rosa  #") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(str(tmp_path))
        PeftModel.from_pretrained(base, str(tmp_path), config=config)
    script = "import sys, peft; peft.PeftConfig.from_pretrained(sys.argv[1])"
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "KeyError: 'ROSA'" in found.stderr  # PEFT has no place for a hint: hence the folder's


def test_a_second_save_adds_nothing_and_own_text_stays(tmp_path):
    card = tmp_path / "README.md"
    card.write_bytes(b"---\nlicense: mit\n---\n# Mine\n\nWith words of my own: \xc3\xa4.\n")
    model, _ = save(tmp_path)
    once = card.read_text(encoding="utf-8")
    assert "words of my own: ä." in once
    assert "license: mit" in once
    assert once.count("## Loading this adapter") == 1
    model.save_pretrained(tmp_path)
    assert card.read_text(encoding="utf-8").rstrip() == once.rstrip()


def test_an_adapter_with_a_name_has_its_card_one_folder_up(tmp_path):
    model = get_peft_model(Mlp(), RosaConfig(r=2, target_modules=["first"]), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert "import rosa" in (tmp_path / "README.md").read_text()
    assert "import rosa" in (tmp_path / "mine" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    "text", ["# A project\n", "---\nlibrary_name: peft\n---\nFirst import rosa.\n"]
)
def test_other_files_and_cards_that_say_so_are_left_alone(text, tmp_path):
    card = tmp_path / "README.md"
    card.write_text(text)
    RosaConfig(r=2).save_pretrained(str(tmp_path / "config"))
    RosaConfig(r=2).save_pretrained(str(tmp_path))
    assert card.read_text() == text
    assert not (tmp_path / "config" / "README.md").exists()
