"""`rosa demo` goes all the way, with a tiny model in the place of the pretrained one."""

from __future__ import annotations

from rosa.bench import demo
from tests.helpers import run
from tests.models import save_with_tokenizer, tiny_bert


def test_the_demo_trains_compares_and_exports(tmp_path, monkeypatch, capsys):
    model = save_with_tokenizer(tiny_bert(), tmp_path / "model")
    monkeypatch.setattr(demo, "model_folder", lambda: model)
    monkeypatch.setattr(demo, "EPOCHS", 1.0)
    run("demo", "--output", tmp_path / "demo")
    shown = " ".join(capsys.readouterr().out.split())
    for said in ("ROSA, rank 8", "new head only", "merged:", "lora:", "largest difference"):
        assert said in shown
    assert (tmp_path / "demo" / "loss.png").is_file()
    assert (tmp_path / "demo" / "rosa-merged" / "model.safetensors").is_file()
    assert (tmp_path / "demo" / "rosa-lora" / "adapter_model.safetensors").is_file()
