"""Damaged, foreign and hostile adapters: refused in words, and the model stays what it was."""

from __future__ import annotations

import copy
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from rosa import RosaConfig
from rosa.bench.storage.models import load_trained
from rosa.errors import UserError
from rosa.export.lazily import mapped_lazily
from rosa.layers.in_model import rosa_layers
from tests.helpers import fails, moved, trained_run
from tests.models import save_with_tokenizer, tiny_bert, tiny_gpt2

HEAD = "base_model.model.classifier.weight"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(12).reshape(2, 6)


def base_and_saved(folder: Path, kind: str = "bert", **options: Any) -> tuple[nn.Module, PeftModel]:
    """A plain model, and the same with a trained adapter that lies in a folder."""
    base = (tiny_bert() if kind == "bert" else tiny_gpt2(tied=False)).eval()
    how = {"bert": ("SEQ_CLS", ["query", "value"]), "gpt2": ("CAUSAL_LM", ["c_attn"])}[kind]
    options = {"r": 2, "task_type": how[0], "target_modules": how[1], **options}
    model = get_peft_model(copy.deepcopy(base), RosaConfig(**options))
    moved(model)
    model.eval().save_pretrained(str(folder))
    return base, model


@pytest.fixture
def bert(tmp_path):
    return *base_and_saved(tmp_path), tmp_path


def rewrite(folder: Path, **tensors: Any) -> None:
    """Put tensors into a file, or functions of those there; None takes one out."""
    found = load_file(folder / FILE)
    for name, value in tensors.items():
        found[name] = value(found[name]) if callable(value) else value
    save_file({k: v.contiguous() for k, v in found.items() if v is not None}, folder / FILE)


def from_pretrained(base: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(base, str(folder))


def low_cpu(base: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=True)


def trainable(base: nn.Module, folder: Path) -> None:
    PeftModel.from_pretrained(base, str(folder), is_trainable=True)


def load_adapter(base: nn.Module, folder: Path) -> None:
    config = RosaConfig.from_pretrained(str(folder))
    copy.deepcopy(get_peft_model(copy.deepcopy(base), config)).load_adapter(str(folder), "second")


def state_dict(base: nn.Module, folder: Path) -> None:
    config = RosaConfig.from_pretrained(str(folder))
    model = get_peft_model(copy.deepcopy(base), config)
    peft.set_peft_model_state_dict(model, load_file(folder / FILE))


def low_memory_export(base: nn.Module, folder: Path) -> None:
    mapped_lazily(base, folder)


WAYS = [from_pretrained, low_cpu, trainable, load_adapter, state_dict, low_memory_export]
EMBEDDING = "base_model.model.bert.embeddings.LayerNorm.weight"
FACTOR = "base_model.model.bert.encoder.layer.0.attention.self.query.rosa_A"
DRAWS = FACTOR.replace("rosa_A", "rosa_offset.draws")
DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "base weight": (
        {EMBEDDING: torch.ones(16)},
        rf"1 tensors of the adapter file have no place in an adapter, such as '{EMBEDDING}'",
    ),
    "unknown name": ({"../../etc/passwd": torch.ones(1)}, "such as '../../etc/passwd'"),
    "another's head": (
        {"base_model.model.classifier.original_module.weight": torch.ones(2, 16)},
        "have no place in an adapter",
    ),
    "no head": ({HEAD: None}, rf"lacks 1 tensors of modules .* such as {HEAD}"),
    "integer head": ({HEAD: torch.Tensor.int}, "classifier.weight is of torch.int32, the model's"),
    "complex head": ({HEAD: lambda t: t + 1j}, "classifier.weight is of torch.complex64"),
    "float8 head": ({HEAD: lambda t: t.to(torch.float8_e4m3fn)}, "is of torch.float8_e4m3fn"),
    "NaN in the head": ({HEAD: lambda t: t / 0}, "classifier.weight has NaN or infinity"),
    "shape of the head": ({HEAD: lambda t: t[:1]}, r"has the shape \(1, 16\), the model's \(2, 16"),
    "integer factor": ({FACTOR: torch.Tensor.int}, "query: torch.int32 instead of numbers in fl"),
    "bool factor": ({FACTOR: torch.Tensor.bool}, "query: torch.bool instead of numbers in float"),
    "complex factor": ({FACTOR: lambda t: t + 1j}, "query: torch.complex64 instead of numbers"),
    "float8 factor": ({FACTOR: lambda t: t.to(torch.float8_e5m2)}, "query: torch.float8_e5m2 in"),
    "no dimensions": ({FACTOR: torch.tensor(1.0)}, r"query: file A \(\)"),
    "complex draws": ({DRAWS: lambda t: t + 1j}, "the count of draws is not a number"),
    "draws in a list": ({DRAWS: torch.ones(2).long()}, "the count of draws is not a number"),
    "a quarter draw": ({DRAWS: torch.tensor(0.25)}, "the count of draws is not a number"),
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_belong_is_refused_whichever_way_it_is_loaded(bert, way, damage):
    base, _, folder = bert
    expected = base(IDS).logits
    tensors, message = DAMAGE[damage]
    rewrite(folder, **tensors)
    with pytest.raises(UserError, match=message):
        way(base, folder)
    assert torch.equal(base(IDS).logits, expected)


@pytest.mark.parametrize("way", [from_pretrained, low_cpu, trainable])
@pytest.mark.parametrize("damage", ["base weight", "no head", "cut", "empty", "factor"])
def test_a_failed_load_leaves_the_base_model_as_it_was(bert, way, damage):
    base, model, folder = bert
    good = {"weights": (folder / FILE).read_bytes()}
    modules, names = dict(base.named_modules()), set(vars(base))
    trained = [p.requires_grad for p in base.parameters()]
    values = {name: value.clone() for name, value in base.state_dict().items()}
    if damage in ("cut", "empty"):
        (folder / FILE).write_bytes(good["weights"][:-50] if damage == "cut" else b"")
    else:
        rewrite(folder, **DAMAGE.get(damage, ({FACTOR: None}, ""))[0])
    with pytest.raises(Exception, match=r".") as error:
        way(base, folder)
    assert type(error.value).__name__ in ("UserError", "SafetensorError")
    assert dict(base.named_modules()) == modules
    assert set(vars(base)) == names
    assert [p.requires_grad for p in base.parameters()] == trained
    assert all(torch.equal(value, values[name]) for name, value in base.state_dict().items())
    (folder / FILE).write_bytes(good["weights"])
    loaded = PeftModel.from_pretrained(base, str(folder))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("damage", ["base weight", "no head", "cut", "tokens"])
def test_a_second_adapter_that_fails_is_gone_and_the_first_works_on(tmp_path, damage, low_memory):
    tokens = {"trainable_token_indices": {"word_embeddings": [1, 5]}}
    _, model = base_and_saved(tmp_path / "first", **tokens)
    further = {"target_modules": ["query", "dense"], "modules_to_save": ["pooler.dense"]}
    base_and_saved(tmp_path / "second", **further, **tokens)
    before, state = model(IDS).logits, copy.deepcopy(model.state_dict())
    modules, active = dict(model.named_modules()), model.active_adapters
    if damage == "cut":
        path = tmp_path / "second" / FILE
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "tokens":
        name = "base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens"
        rewrite(tmp_path / "second", **{f"{name}_delta": lambda t: t / 0})
    else:
        rewrite(tmp_path / "second", **DAMAGE[damage][0])
    with pytest.raises(Exception, match=r"."):
        model.load_adapter(str(tmp_path / "second"), "second", low_cpu_mem_usage=low_memory)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == active
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, before)
    base_and_saved(tmp_path / "third", **further, **tokens)
    model.load_adapter(str(tmp_path / "third"), "second")
    assert torch.equal(model(IDS).logits, before)


def test_adding_an_adapter_that_cannot_be_takes_its_layers_out_again():
    """A module list cannot be trained in full, which PEFT finds once layers have been replaced."""
    base = nn.Sequential()
    base.first, base.others = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])
    modules = dict(base.named_modules())
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        get_peft_model(base, RosaConfig(target_modules=["first"], modules_to_save=["others"]))
    assert dict(base.named_modules()) == modules


def test_heads_of_other_sizes_can_be_left_out_as_peft_does(bert, tmp_path_factory):
    _, _, folder = bert
    other, how = tiny_bert(labels=3), {"ignore_mismatched_sizes": True}
    with pytest.raises(UserError, match=r"shape \(2, 16\), the model's \(3, 16\)"):
        PeftModel.from_pretrained(other, str(folder))
    own = other.classifier.weight.clone()
    with pytest.warns(UserWarning, match="were not initialized from the model checkpoint"):
        loaded = PeftModel.from_pretrained(other, str(folder), **how)
    assert torch.equal(loaded.base_model.model.classifier.weight, own)
    rewrite(folder, **{FACTOR: lambda t: t[:1]})
    with pytest.raises(UserError, match=r"query: file A \(1, 16\)"):
        PeftModel.from_pretrained(tiny_bert(), str(folder), **how)


@pytest.mark.parametrize("bias", ["all", "rosa_only"])
def test_biases_are_all_there_and_nothing_but_biases(tmp_path, bias):
    base, model = base_and_saved(tmp_path, bias=bias)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    name = "base_model.model.bert.encoder.layer.1.attention.self.value.base_layer.bias"
    rewrite(tmp_path, **{name: lambda t: t / 0})
    with pytest.raises(UserError, match=r"base_layer\.bias has NaN or infinity"):
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    rewrite(tmp_path, **{name: None})
    with pytest.raises(UserError, match=f"lacks 1 trained biases, such as {name}"):
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))


def test_embeddings_are_an_adapters_where_it_was_saved_with_them(tmp_path):
    base, model = base_and_saved(tmp_path, "gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(53)
    expected = larger(IDS).logits
    with pytest.raises(UserError, match=r"weight has the shape \(50, 16\), the model's \(53"):
        PeftModel.from_pretrained(larger, str(tmp_path))
    assert torch.equal(larger(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_head_of_another_precision_is_in_the_models(bert, dtype, low_memory):
    base, model, folder = bert
    rewrite(folder, **{HEAD: lambda t: t.to(dtype)})
    loaded = PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=low_memory)
    near = 1e-5 if dtype is torch.float64 else 0.05
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=near, atol=near)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_factor_of_another_precision_than_the_other_is_no_matter(bert, low_memory):
    base, model, folder = bert
    rewrite(folder, **{FACTOR: torch.Tensor.double})
    loaded = PeftModel.from_pretrained(base, str(folder), low_cpu_mem_usage=low_memory)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / FILE), folder / "adapter_model.bin")
    (folder / FILE).unlink()


def a_pipe(folder: Path) -> None:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


FOLDERS: dict[str, tuple[Any, type[Exception], str]] = {
    "pickle": (pickled, UserError, "adapter_model.bin.* is a pickle, which can run code and is n"),
    "pipe": (a_pipe, UserError, "adapter_model.safetensors is not a file"),
    "no weights": (lambda f: (f / FILE).unlink(), FileNotFoundError, "its weights are missing"),
    "list": (lambda f: (f / CONFIG).write_text("[]"), UserError, "of no adapter that PEFT knows"),
    "method": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "ROZA"}'),
        UserError,
        "its peft_type is 'ROZA'. It is damaged, or of a newer PEFT",
    ),
    "nested": (
        lambda f: (f / CONFIG).write_text("[" * 10**5 + "]" * 10**5),
        UserError,
        r"is not valid JSON \(nested too deep\)",
    ),
    "binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\0"), UserError, "is not valid JSON"),
    "digits": (lambda f: (f / CONFIG).write_text("9" * 5000), UserError, "is not valid JSON"),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_folders_that_cannot_be_read_are_refused(bert, damage):
    base, model, folder = bert
    change, kind, message = FOLDERS[damage]
    change(folder)
    with pytest.raises(kind, match=message):
        PeftModel.from_pretrained(base, str(folder))
    with pytest.raises(kind, match=message):
        model.load_adapter(str(folder), "second")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("damage", FOLDERS)
def test_the_commands_refuse_them_too(tmp_path, damage):
    _, model = base_and_saved(tmp_path / "adapter")
    save_with_tokenizer(model.unload(), tmp_path / "base")
    model.config.save_pretrained(tmp_path / "adapter")
    FOLDERS[damage][0](tmp_path / "adapter")
    with pytest.raises((UserError, FileNotFoundError), match="adapter_"):
        load_trained(tmp_path / "adapter", str(tmp_path / "base"))


def test_a_pickle_on_the_hub_is_not_read(bert, monkeypatch):
    _, model, _ = bert
    monkeypatch.setattr(peft.peft_model, "load_peft_weights", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError, match=r"nobody/nothing has no adapter_model\.safetensors"):
        model.load_adapter("nobody/nothing", "default")


def test_a_message_of_pefts_in_a_value_is_no_message(bert):
    base, _, folder = bert
    config = json.loads((folder / CONFIG).read_text())
    config["r"] = "__init__() got an unexpected keyword argument 'x'"
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="r must be a positive integer"):
        PeftModel.from_pretrained(base, str(folder))


@pytest.mark.parametrize("fails", [False, True])
def test_other_methods_load_as_before(tmp_path, fails):
    base = tiny_gpt2().eval()
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["c_attn"]))
    lora.save_pretrained(str(tmp_path))
    if fails:
        rewrite(tmp_path, **{"base_model.model.transformer.wte.weight": torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match="size mismatch") if fails else nullcontext():
        PeftModel.from_pretrained(base, str(tmp_path))
    assert any("lora_A" in name for name, _ in base.named_parameters())


def test_what_saving_gives_is_what_loading_takes(bert):
    base, model, folder = bert
    loaded = PeftModel.from_pretrained(base, str(folder))
    saved = load_file(folder / FILE)
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in saved)
    assert len(list(rosa_layers(loaded))) == len(list(rosa_layers(model)))


def test_a_task_that_the_model_cannot_do_is_named(bert):
    base, _, folder = bert
    modules = dict(base.named_modules())
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    with pytest.raises(UserError, match="task_type=CAUSAL_LM cannot be put on a BertForSequence"):
        PeftModel.from_pretrained(base, str(folder))
    assert dict(base.named_modules()) == modules


def test_tokens_that_no_config_names_are_refused_beside_anothers(tmp_path):
    _, model = base_and_saved(tmp_path, trainable_token_indices={"word_embeddings": [1]})
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": None}))
    with pytest.raises(UserError, match="must be of the same embeddings for all adapters"):
        model.load_adapter(str(tmp_path), "second")
    base = tiny_bert()
    with pytest.raises(UserError, match=r"have no place in an adapter, such as .*token_adapter"):
        PeftModel.from_pretrained(base, str(tmp_path))


class Payload:
    """What a pickle would do when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_with_a_foreign_pickle_is_not_resumed(tmp_path, capsys):
    trained_run(tmp_path, 4)
    (tmp_path / "run" / "metrics.json").unlink()  # as if it had been stopped
    for state in (tmp_path / "run" / "checkpoints").glob("*/optimizer.pt"):
        torch.save(Payload(tmp_path / "opened"), state)
        (state.parent / "whole.json").unlink()  # which would tell that it has changed
    how = ["--steps", 4, "--lr", 0.01, "--resample-every", 2, "--rank", 2, "--resume"]
    base, table = tmp_path / "base", tmp_path / "t.csv"
    message = fails(
        capsys, "train", "--model", base, "--train", table, "--output", tmp_path / "run", *how
    )
    assert "cannot be resumed" in message
    assert not (tmp_path / "opened").exists()
