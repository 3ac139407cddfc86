from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from rosa import RosaConfig, export_lora, export_merged, export_rosa, resample
from rosa.errors import ExportError, UserError
from rosa.export import lora
from rosa.export.lazily import mapped_lazily
from rosa.export.merged import write_merged, write_plain
from rosa.layers.base import RosaLayer
from tests.architectures import ARCHITECTURES
from tests.models import Mlp, tiny_bert, tiny_gpt2


def learned(base, **options):
    model = get_peft_model(base, RosaConfig(**{"r": 2, **options}))
    for _ in range(3):
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p), alpha=0.05)
        resample(model)
    return model.eval()


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_a_lora_export_is_exact(tmp_path, build):
    base, ids = build().eval(), torch.randint(50, (3, 9))
    kind = "SEQ_CLS" if hasattr(base, "classifier") else "CAUSAL_LM"
    model = learned(copy.deepcopy(base), target_modules="all-linear", task_type=kind, alpha=3)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(base, str(tmp_path))
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(lora(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    # Three trained rounds of rank 2, each left and entered: at most 2 r a round.
    assert max(lora.peft_config["default"].rank_pattern.values()) <= 12


@pytest.mark.parametrize("export", [export_lora, export_rosa])
@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_what_was_merged_is_no_adapter_any_more(tmp_path, export, how):
    model = learned(tiny_gpt2(), target_modules=["c_attn"])
    getattr(model, how)()
    with pytest.raises(ValueError, match="no layer of adapter 'default' any more, as after merge"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_export_is_a_plain_model(tmp_path):
    base, ids = tiny_bert().eval(), torch.randint(50, (3, 9))
    names = set(base.state_dict())
    model = learned(base, target_modules="all-linear", task_type="SEQ_CLS")
    expected = model(ids).logits
    export_merged(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, expected)  # the model itself is as it was
    plain = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert set(plain.state_dict()) == names
    torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_merged_export_is_written_in_files_of_a_size(tmp_path):
    base, ids = tiny_bert().eval(), torch.randint(50, (3, 9))
    model = learned(base, target_modules="all-linear", task_type="SEQ_CLS")
    export_merged(model, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    plain = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_weight_by_weight_gives_the_same_numbers(tmp_path, dtype):
    base = tiny_bert().to(dtype)
    plain = copy.deepcopy(base)
    model = learned(base, target_modules="all-linear", task_type="SEQ_CLS", bias="rosa_only")
    model.save_pretrained(tmp_path / "adapter")
    for name in ("whole", "by weight"):
        (tmp_path / name).mkdir()
    write_merged(model, "default", tmp_path / "whole")
    write_plain(*mapped_lazily(plain, tmp_path / "adapter"), tmp_path / "by weight")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "by weight"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name].dtype == value.dtype
        torch.testing.assert_close(two[name], value)  # in float32 the one has been in and out
        if dtype == torch.bfloat16:
            assert torch.equal(two[name], value)


def test_merging_weight_by_weight_looks_at_the_base_and_at_the_numbers(tmp_path):
    plain = tiny_bert()
    model = learned(copy.deepcopy(plain), target_modules="all-linear", task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    another = copy.deepcopy(plain)
    another.bert.encoder.layer[0].output.dense.weight.data.mul_(1.5)
    with pytest.warns(UserWarning, match=r"trained on other base weights: 1 of"):
        mapped_lazily(another, tmp_path)
    another.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"other base weights"):
        broken = mapped_lazily(another, tmp_path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match=r"layer\.0\.output\.dense has NaN or infinity"):
        write_plain(*broken, tmp_path / "merged")


def test_merging_gives_the_bases_own_class_and_weight_names():
    base = tiny_bert()
    names, ids = list(base.state_dict()), torch.randint(50, (2, 5))
    model = learned(base, target_modules="all-linear", task_type="SEQ_CLS")
    expected = model(ids).logits
    plain = model.merge_and_unload(safe_merge=True).eval()
    assert type(plain) is BertForSequenceClassification
    assert list(plain.state_dict()) == names
    torch.testing.assert_close(plain(ids).logits, expected)


@pytest.mark.parametrize("targets", [["first", "last"], ["middle"]])
def test_pefts_own_conversion_to_lora(tmp_path, targets):
    base, x = Mlp(torch.float32), torch.randn(4, 7)
    model = learned(copy.deepcopy(base), target_modules=targets)
    assert model.supports_lora_conversion()
    config, state = convert_to_lora(model, rank=1.0)
    assert isinstance(config, LoraConfig)
    assert state
    save_as_lora(str(tmp_path), model, rank=1.0)
    lora = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(lora(x), model(x), rtol=1e-3, atol=1e-3)


def test_heads_and_biases_are_exported_too(tmp_path):
    base, x = Mlp(torch.float32), torch.randn(4, 7)
    model = learned(
        copy.deepcopy(base), target_modules=["first"], modules_to_save=["last"], bias="rosa_only"
    )
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=1e-5)


def test_only_rosa_is_exported(tmp_path):
    lora = get_peft_model(Mlp(), LoraConfig(target_modules=["first"]))
    for export in (export_lora, export_merged):
        with pytest.raises(ValueError, match="'default' is not a ROSA adapter"):
            export(lora, tmp_path)
        with pytest.raises(ValueError, match="expected a PeftModel with ROSA, got Mlp"):
            export(Mlp(), tmp_path)


def test_another_merged_adapter_is_not_exported(tmp_path):
    base, ids = tiny_bert().eval(), torch.randint(50, (3, 9))
    model = learned(base, target_modules=["query"], task_type="SEQ_CLS")
    model.add_adapter("b", RosaConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    model.set_adapter("b")
    expected = model(ids).logits
    model.merge_adapter(["default"])
    export_merged(model, tmp_path, "b")
    plain = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)


def test_names_that_end_alike_are_told_apart(tmp_path):
    """A layer named as the ending of others, with another rank, beside one that is not adapted."""

    def build():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        return nn.Sequential(nn.Linear(6, 6), inner, nn.Sequential(nn.Linear(6, 6)))

    base, x = build(), torch.randn(3, 6)
    model = learned(copy.deepcopy(base), target_modules=r"0|1\.1", rank_pattern={"^0": 1})
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(build(), str(tmp_path))
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=1e-5)


def test_a_layer_that_changed_nothing_is_exported(tmp_path):
    base, x = Mlp(torch.float32), torch.randn(3, 7)
    config = RosaConfig(r=2, target_modules=["first"], inference_mode=True)
    export_lora(get_peft_model(copy.deepcopy(base), config), tmp_path)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(lora(x), base(x))


EXPORTS = pytest.mark.parametrize("export", [export_lora, export_merged])


def load_export(export, folder, base):
    if export is export_merged:
        return type(base).from_pretrained(folder).eval()
    return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def state_of(model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, getattr(m, "merged", None)) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    return weights, flags, trained, list(model.active_adapters)


@EXPORTS
@pytest.mark.parametrize("state", ["training", "merged", "disabled", "another is active"])
def test_exports_in_any_state_are_the_adapter_and_leave_the_model_alone(tmp_path, export, state):
    base, ids = tiny_bert().eval(), torch.randint(50, (3, 9))
    model = learned(copy.deepcopy(base), target_modules="all-linear", task_type="SEQ_CLS")
    expected = model(ids).logits
    model.add_adapter("b", RosaConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    if state == "training":
        model.train()
    elif state == "merged":
        model.merge_adapter(["default"])
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    else:  # with a head of its own
        model.set_adapter("b")
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p), alpha=0.1)
    before = state_of(model)
    export(model, tmp_path, "default")
    after = state_of(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    found = load_export(export, tmp_path, base)
    torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-5)


@EXPORTS
@pytest.mark.parametrize("does", ["disables", "merges and unmerges", "writes W_0"])
def test_what_others_did_to_the_shared_weights_is_looked_at_before_an_export(
    tmp_path, export, does
):
    base, ids = tiny_bert().eval(), torch.randint(50, (3, 9))
    model = learned(copy.deepcopy(base), target_modules="all-linear", task_type="SEQ_CLS")
    expected = model(ids).logits
    sharing = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    if does == "writes W_0":
        for layer in (m for m in model.modules() if isinstance(m, RosaLayer)):
            pretrained = layer.pretrained_weight()
            layer.base_weight.parameter.data.copy_(pretrained)
    elif does == "disables":
        sharing.base_model.disable_adapter_layers()
    else:
        sharing.merge_adapter()
        with pytest.raises(UserError, match="was changed while ROSA's offset stood in it"):
            export(model, tmp_path, "default")
        sharing.unmerge_adapter()
    export(model, tmp_path, "default")
    found = load_export(export, tmp_path, base)
    torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


@EXPORTS
@pytest.mark.parametrize("wrapper", ["compile", "data parallel", "mixed precision"])
def test_wrapped_models_are_exported(tmp_path, export, wrapper):
    base, ids = tiny_bert().eval(), torch.randint(50, (3, 9))
    model = learned(copy.deepcopy(base), target_modules="all-linear", task_type="SEQ_CLS")
    expected = model(ids).logits
    wrapped = model
    if wrapper == "compile":
        wrapped = torch.compile(model)
    elif wrapper == "data parallel":
        wrapped = nn.DataParallel(model)
    else:
        wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    export(wrapped, tmp_path)
    found = load_export(export, tmp_path, base)
    torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-5)


@EXPORTS
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "c_attn"]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_exports_in_any_precision_keep_it(tmp_path, export, dtype, targets):
    tied = targets == "all-linear"  # beside an adapted head, PEFT writes its pretrained weight
    base, ids = tiny_gpt2(tied).to(dtype).eval(), torch.randint(50, (3, 9))
    model = learned(copy.deepcopy(base), target_modules=targets, task_type="CAUSAL_LM")
    expected = model(ids).logits.float()
    export(model, tmp_path)
    found = load_export(export, tmp_path, base)
    assert found.dtype == dtype
    change = float((expected - base(ids).logits.float()).abs().max())
    part = 1e-6 if dtype == torch.float64 else 0.3
    assert float((found(ids).logits.float() - expected).abs().max()) < part * change


@EXPORTS
def test_tied_models_with_a_new_embedding_and_generation_settings(tmp_path, export):
    base, ids = tiny_gpt2(tied=True).eval(), torch.randint(50, (3, 9))
    base.generation_config.max_new_tokens = 3
    model = learned(
        copy.deepcopy(base), target_modules=["c_attn"], modules_to_save=["wte"], task_type=None
    )
    expected = model(ids).logits
    export(model, tmp_path)
    found = load_export(export, tmp_path, base)
    torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-5)
    if export is export_merged:
        assert isinstance(found, GPT2LMHeadModel)
        assert found.generation_config.max_new_tokens == 3
        model.generation_config.temperature = 0.5  # of no use without do_sample
        with pytest.raises(UserError, match=r"nothing was written.*GenerationConfig is invalid"):
            export(model, tmp_path / "invalid")
        assert not (tmp_path / "invalid").exists()


def test_a_plain_module_is_exported_as_its_state_dict(tmp_path):
    base, x = Mlp(torch.float32), torch.randn(4, 7)
    model = learned(copy.deepcopy(base), target_modules=["first", "middle"])
    export_merged(model, tmp_path)
    base.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    torch.testing.assert_close(base(x), model(x))


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["gate_proj"],
        ["down_proj", "o_proj"],
        ["shared_experts.up_proj"],
        r".*layers\.0\..*(gate|up)_proj",
    ],
)
@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2-moe"])
def test_layers_that_peft_takes_for_experts_are_exported(tmp_path, name, targets):
    architecture = ARCHITECTURES[name]
    if name == "qwen2-moe" and targets == ["shared_experts.up_proj"]:
        targets = ["shared_expert.up_proj"]
    base, inputs = architecture.build(0), architecture.inputs()
    model = learned(copy.deepcopy(base), target_modules=targets, task_type="CAUSAL_LM")
    expected = model(**inputs).logits
    change = float((expected - base(**inputs).logits).abs().max())
    assert change > 0.01
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(lora(**inputs).logits, expected, rtol=0, atol=1e-3 * change)


def spoiled(monkeypatch, change):
    """Let every LoRA file be written with a change."""

    def save(state, path, **kwargs):
        state = dict(state)
        change(state)
        save_file(state, path, **kwargs)

    monkeypatch.setattr(lora, "save_file", save)


KEY = "base_model.model.first.lora_B.weight"
CHANGES = {
    "a number": lambda state: state.update({KEY: state[KEY] * 1.001}),
    "a layer is missing": lambda state: [state.pop(k) for k in list(state) if "first" in k],
    "a head": lambda state: state.update({k: v + 1e-3 for k, v in state.items() if "last" in k}),
    "a head is missing": lambda state: [state.pop(k) for k in list(state) if "last" in k],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_lora_file_that_loads_as_something_else_is_not_left_behind(tmp_path, monkeypatch, change):
    model = learned(
        Mlp(torch.float32), target_modules=["first", "middle"], modules_to_save=["last"]
    )
    spoiled(monkeypatch, CHANGES[change])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"(first|last).*export_merged") as caught:
        export_lora(model, tmp_path)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, RuntimeError)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ExportError):
        export_lora(model, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_merged_model_that_loads_as_something_else_is_not_left_behind(tmp_path, monkeypatch):
    model = learned(tiny_bert(), target_modules="all-linear", task_type="SEQ_CLS")
    save = BertForSequenceClassification.save_pretrained

    def lossy(self, folder, **kwargs):
        save(self, folder, **kwargs)
        path = f"{folder}/model.safetensors"
        state = load_file(path)
        state["classifier.bias"] = state["classifier.bias"] + 1e-6
        save_file(state, path, metadata={"format": "pt"})

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", lossy)
    with pytest.raises(ExportError, match=r"classifier\.bias differ"):
        export_merged(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@EXPORTS
def test_what_a_folder_holds_stays_as_it_is(tmp_path, export):
    model = learned(tiny_bert(), target_modules="all-linear", task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    with pytest.raises(ValueError, match="holds a model or an adapter already"):
        export(model, tmp_path / "adapter")
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    export(model, tmp_path / "new")
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "new").glob(".export*"))
    with pytest.raises(ValueError, match="is a file"):
        export(model, tmp_path / "new" / "notes.txt")


class Reads(nn.Module):
    """Reads a weight that it calls as well, or does not call."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 12), nn.Linear(12, 50)
        self.calls = calls

    def forward(self, ids):
        if self.calls:
            return self.embed(ids) @ self.embed.weight.T
        return self.embed.weight[ids] @ self.head.weight.T + self.head.bias


@pytest.mark.parametrize(
    ("calls", "targets"),
    [(True, ["embed"]), (False, ["head"]), (False, ["embed", "head"])],
)
def test_weights_that_are_read_are_no_loras(tmp_path, calls, targets):
    model = learned(Reads(calls), target_modules=targets)
    model(torch.randint(50, (3, 4)))
    with pytest.raises(ExportError, match="reads the weight"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def tripled(module: nn.Module) -> None:
    plain = type(module).forward
    module.forward = lambda x: 3 * plain(module, x)  # type: ignore[method-assign]


def the_same(module: nn.Module) -> None:
    plain = type(module).forward
    module.forward = lambda x: plain(module, x)  # type: ignore[method-assign]


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, _args, out: 3 * out)


@pytest.mark.parametrize("name", ["embed", "head"])
@pytest.mark.parametrize("change", [tripled, hooked])
def test_what_is_computed_inside_a_module_is_no_loras(tmp_path, name, change):
    model = learned(tiny_gpt2(tied=False), target_modules=["wte" if name == "embed" else "lm_head"])
    change(next(m for m in model.modules() if isinstance(m, RosaLayer)).get_base_layer())
    model(torch.randint(50, (3, 4)))
    if change is hooked:
        with pytest.warns(UserWarning, match="has hooks"):
            export_lora(model, tmp_path / "lora")
    else:
        with pytest.raises(ExportError, match="a forward of its own"):
            export_lora(model, tmp_path / "lora")


def test_a_forward_of_its_own_that_computes_the_same_is_exported(tmp_path):
    base = tiny_gpt2(tied=False)
    model = learned(copy.deepcopy(base), target_modules=["lm_head"])
    the_same(model.base_model.model.lm_head.base_layer)
    export_lora(model, tmp_path)
    ids = torch.randint(50, (3, 4))
    lora = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(lora(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [["pooler"], ["classifier"], ["bert.encoder.layer.1"]])
@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("form", ["adapter", "lora", "rosa"])
def test_all_biases_beside_modules_that_are_trained_whole(tmp_path, trained, name, form):
    base, ids = tiny_bert(), torch.randint(50, (3, 9))
    model = learned(
        copy.deepcopy(base), target_modules=["query"], modules_to_save=trained, bias="all"
    )
    write = {"adapter": PeftModel.save_pretrained, "lora": export_lora, "rosa": export_rosa}[form]
    write(model, tmp_path / "out")
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not [key for key in held if "modules_to_save" in key or "original_module" in key]
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"), adapter_name=name).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_file_that_holds_biases_twice_is_loaded(tmp_path):
    """As PEFT writes them, and as earlier versions did."""
    base, ids = tiny_bert(), torch.randint(50, (3, 9))
    options = {"target_modules": ["query"], "modules_to_save": ["pooler"], "bias": "all"}
    model = learned(copy.deepcopy(base), **options)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    for inside in ("modules_to_save.default", "original_module"):
        key = f"base_model.model.bert.pooler.{inside}.dense.bias"
        state[key] = state["base_model.model.bert.pooler.dense.bias"] + 1  # is not looked at
    save_file(state, path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path), adapter_name="other").eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_tied_weights_with_tokens_of_their_own_are_no_plain_model(tmp_path):
    options = {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    tokens = {"wte": [4, 5], "lm_head": [6]}
    model = learned(tiny_gpt2(tied=True), **options, trainable_token_indices=tokens)
    with pytest.raises(UserError, match="tied, and each has trained tokens"):
        export_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("targets", [["wte"], ["conv"]])
def test_pefts_conversion_is_refused_for_other_layers_than_linear_ones(targets):
    base = tiny_gpt2(tied=False) if targets == ["wte"] else nn.Sequential(nn.Conv1d(3, 5, 2))
    model = learned(base, target_modules=targets if targets == ["wte"] else ["0"])
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
