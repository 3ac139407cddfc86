"""Attaching ROSA: which modules, with which settings, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from torch import nn

from rosa import RosaConfig, resample, watch
from rosa.layers.in_model import rosa_layers
from rosa.registration import check_peft_version
from tests.architectures import ARCHITECTURES
from tests.models import Mlp, tiny_bert, tiny_gpt2


def attach(model, adapter="default", **options):
    return get_peft_model(model, RosaConfig(**{"r": 2, **options}), adapter_name=adapter)


def names(model):
    return [name.removeprefix("base_model.model.") for name, _ in rosa_layers(model)]


def test_rosa_is_a_method_of_peft():
    assert RosaConfig().peft_type == PeftType.ROSA == "ROSA"
    assert RosaConfig(r=4).to_dict()["peft_type"] == "ROSA"


@pytest.mark.parametrize("version", ["0.20.0", "0.15.2"])
def test_an_old_peft_fails_clearly(version):
    with pytest.raises(ImportError, match=rf"needs peft >= 0.21.2 and < 0.22, found {version}"):
        check_peft_version(version)


def test_an_untested_peft_warns():
    with pytest.warns(UserWarning, match=r"was tested with peft"):
        check_peft_version("0.22.1")


def test_target_modules_as_in_peft():
    everything = attach(tiny_bert(), target_modules="all-linear", task_type="SEQ_CLS")
    assert len(names(everything)) == 13  # six a layer and the pooler, not the head
    assert "classifier" not in names(everything)
    defaults = attach(tiny_bert(), task_type="SEQ_CLS")
    assert all(name.endswith(("query", "value")) for name in names(defaults))
    regex = attach(tiny_bert(), target_modules=r".*layer\.1\..*\.(key|query)")
    assert len(names(regex)) == 2
    some = attach(tiny_bert(), target_modules=["key"], layers_to_transform=[1])
    assert names(some) == ["bert.encoder.layer.1.attention.self.key"]
    fewer = attach(
        tiny_bert(), target_modules="all-linear", exclude_modules=["key"], task_type="SEQ_CLS"
    )
    assert len(names(fewer)) == 11
    conv = attach(tiny_gpt2(), target_modules=["c_attn"], task_type="CAUSAL_LM")
    assert len(names(conv)) == 2


def test_ranks_and_alphas_by_pattern():
    model = attach(
        Mlp(),
        target_modules=["first", "middle", "last"],
        alpha=4,
        rank_pattern={"middle": 4},
        alpha_pattern={"last": 1},
    )
    layers = dict(zip(names(model), (layer for _, layer in rosa_layers(model)), strict=True))
    ranks = {name: layer.adapters["default"].r for name, layer in layers.items()}
    scalings = {name: layer.adapters["default"].scaling for name, layer in layers.items()}
    assert ranks == {"first": 2, "middle": 4, "last": 2}
    assert scalings == {"first": 2.0, "middle": 1.0, "last": 0.5}


def test_a_rank_above_the_weights_is_capped_and_said_once():
    x = torch.randn(4, 7).double()
    base = Mlp()
    expected = base(x)
    with pytest.warns(UserWarning, match=r"first \(64 to 7\), middle \(64 to 6\)") as caught:
        model = attach(base, r=64, target_modules=["first", "middle"])
    assert len([w for w in caught if "capped" in str(w.message)]) == 1
    assert {layer.adapters["default"].r for _, layer in rosa_layers(model)} == {6, 7}
    torch.testing.assert_close(model(x), expected)
    resample(model)
    torch.testing.assert_close(model(x), expected)


def test_biases_train_if_asked():
    model = attach(Mlp(), target_modules=["first"], bias="rosa_only")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n in trained if n.endswith(".bias")] == ["base_model.model.first.base_layer.bias"]


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True])
def test_a_rank_that_is_no_positive_integer_is_refused(rank):
    with pytest.raises((ValueError, TypeError), match="r must be a positive integer, got"):
        RosaConfig(r=rank)
    with pytest.raises((ValueError, TypeError), match=r"rank_pattern\['q'\] must be a positive"):
        RosaConfig(rank_pattern={"q": rank})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "random"}, "directions must be one of svd, orthonormal"),
        ({"trained": "C"}, "trained must be one of both, A, B"),
        ({"bias": "lora_only"}, "bias must be one of none, all, rosa_only"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": "8"}, "alpha must be a positive number"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"rosa_dropout": 1.0}, "rosa_dropout must be at least 0 and below 1"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "list of names"),
        ({"layers_pattern": "layer"}, "give both"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RosaConfig(**options)


def test_no_match_lists_near_names():
    with pytest.raises(NoMatchingPeftModuleError, match="Did you mean query"):
        attach(tiny_bert(), target_modules=["qurey"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"give a list, \['query'\]"):
        attach(tiny_bert(), target_modules="query")
    with pytest.raises(NoMatchingPeftModuleError, match=r"Layers .*: classifier, dense, key"):
        attach(tiny_bert(), target_modules=["zzz"])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_weight_is_named_and_nothing_is_changed(broken):
    base = Mlp()
    with torch.no_grad():
        base.last.weight[1, 2] = broken
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="the weight of last has NaN or infinity"):
        attach(base, target_modules=["first", "last"])
    assert type(base.first) is nn.Linear
    for name, value in base.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    base = Mlp()
    before = copy.deepcopy(base.state_dict())
    svd, calls = torch.linalg.svd, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(ValueError, match=r"no subspace of layer middle could be drawn"):
        attach(base, target_modules=["first", "middle", "last"], directions="svd")
    assert type(base.first) is nn.Linear
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_unsupported_layers_are_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(5, 4, max_norm=1.0)
            self.conv = nn.ConvTranspose2d(3, 3, 1)
            self.attention = nn.MultiheadAttention(4, 2)
            self.whole = nn.Linear(4, 4)
            self.whole.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), False)

    with pytest.raises(ValueError, match=r"emb is a Embedding, which is not supported.* changes"):
        attach(Mixed(), target_modules=["emb"])
    with pytest.raises(ValueError, match="conv is a ConvTranspose2d, which is not supported: ROSA"):
        attach(Mixed(), target_modules=["conv"])
    with pytest.raises(ValueError, match=r"out_proj is a NonDynamically.* name the attention"):
        attach(Mixed(), target_modules=["out_proj"])
    with pytest.raises(ValueError, match=r"whole is stored as torch.int8 \(quantized\?\)"):
        attach(Mixed(), target_modules=["whole"])


def test_a_layer_with_another_method_is_refused():
    lora = get_peft_model(Mlp(), LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="first already carries another PEFT method"):
        attach(lora.base_model.model, target_modules=["first"])


def test_tied_weights_are_refused_and_named():
    model = tiny_gpt2(tied=True)
    with pytest.raises(ValueError, match=r"lm_head is shared with transformer.wte"):
        attach(model, target_modules=["lm_head"])
    untied = attach(tiny_gpt2(tied=False), target_modules=["lm_head"])
    assert names(untied) == ["lm_head"]


def test_a_module_that_stands_in_two_places_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared})
    with pytest.raises(ValueError, match="the weight of one is shared with two"):
        attach(model, target_modules=["one"])


def test_weights_that_share_memory_are_refused():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = nn.Parameter(base[0].weight.data)  # another Parameter, the same memory
    with pytest.raises(ValueError, match="the weight of 0 is shared with 1"):
        attach(base, target_modules=["0"])


def test_a_second_adapter_of_one_name_is_refused_and_the_first_stays():
    model, x = attach(Mlp(), target_modules=["first", "last"]), torch.randn(3, 7).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    expected, plain = model(x), model.base_model.model
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ValueError, match="already has a trained ROSA adapter 'default'"),
    ):
        attach(plain, target_modules=["first"])
    torch.testing.assert_close(model(x), expected)


NAMES = ["A", "in_weight", "first", "last", "model", "base_model", "weight", "rosa_B", "", "a.b"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("second", [False, True])
def test_names_that_files_could_not_tell_apart_are_refused(name, second):
    if name in ("first", "last", "model") and not second:
        return  # alone they can
    base, x = Mlp(), torch.randn(3, 7).double()
    expected = base(x)
    config = RosaConfig(r=1, target_modules=["last"])
    model = attach(base, target_modules=["first"]) if second else base
    with pytest.raises(ValueError, match=r"be named|must not be empty or have a dot"):
        model.add_adapter(name, config) if second else attach(base, name, target_modules=["last"])
    torch.testing.assert_close(base(x), expected)


def parts_of_the_model():
    base = tiny_gpt2()
    return sorted({part for name, _ in base.named_parameters() for part in name.split(".")})


@pytest.mark.parametrize("name", parts_of_the_model())
def test_an_adapter_is_not_named_like_a_part_of_the_model(name):
    model = attach(tiny_gpt2(), target_modules=["c_attn"])
    with pytest.raises(ValueError, match=f"be named {name!r}"):
        model.add_adapter(name, RosaConfig(r=1, target_modules=["c_attn"]))
    assert list(model.peft_config) == ["default"]
    if name in ("weight", "bias"):
        return
    alone = attach(tiny_gpt2(), name, target_modules=["c_attn"])  # alone it can be told apart
    with pytest.raises(ValueError, match=f"of several adapters, none can be named {name!r}"):
        alone.add_adapter("other", RosaConfig(r=1, target_modules=["c_attn"]))
    state = get_peft_model_state_dict(alone, adapter_name=name)
    other = attach(tiny_gpt2(), target_modules=["c_attn"])
    set_peft_model_state_dict(other, state)
    found = get_peft_model_state_dict(other)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["l", "lay", "fir", "default2", "rosa-1", "Model", "c_att"])
def test_other_names_train_save_and_load(name, tmp_path):
    base, ids = tiny_gpt2().eval(), torch.randint(50, (2, 6))
    model = attach(copy.deepcopy(base), target_modules=["c_attn"]).eval()
    model.add_adapter(name, RosaConfig(r=1, target_modules=["c_attn", "c_fc"]))
    outputs = {}
    for adapter in ("default", name):
        model.set_adapter(adapter)
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p), alpha=0.1)
        outputs[adapter] = model(ids).logits
    model.save_pretrained(str(tmp_path))
    for adapter, folder in (("default", tmp_path), (name, tmp_path / name)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        torch.testing.assert_close(loaded(ids).logits, outputs[adapter], rtol=0, atol=1e-5)


OWN = ["offset", "rosa_offset", "A", "B", "rosa_A", "dropout", "base_layer", "layer", "default"]


@pytest.mark.parametrize("module", OWN)
def test_modules_to_save_that_end_like_our_own_are_refused(module):
    base, x = Mlp(), torch.randn(3, 7).double()
    expected = base(x)
    with pytest.raises(ValueError, match=r"PEFT takes every module whose name ends so"):
        attach(base, target_modules=["first"], modules_to_save=["last", module])
    torch.testing.assert_close(base(x), expected)
    attach(base, target_modules=["first"], modules_to_save=["last"])


def trained(base, **options):
    model = attach(base, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.05)
    resample(model)
    return model.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "c_fc"], r".*\.c_proj"])
@pytest.mark.parametrize("compiled_later", [False, True])
def test_a_compiled_models_adapter_loads_on_a_plain_one_and_back(targets, compiled_later, tmp_path):
    base, ids = tiny_gpt2().eval(), torch.randint(50, (2, 6))
    compiled = torch.compile(copy.deepcopy(base), backend="eager")
    first, second = (base, compiled) if compiled_later else (compiled, base)
    model = trained(first if first is compiled else copy.deepcopy(first), target_modules=targets)
    model.save_pretrained(str(tmp_path))
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of another base
        loaded = PeftModel.from_pretrained(second, str(tmp_path))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_reference_as_trls_trainers_make_it_is_the_trained_adapter():
    """They add "ref" with the trained adapter's own config, and copy what has LoRA's names."""
    base, ids = tiny_gpt2().eval(), torch.randint(50, (2, 6))
    model = trained(base, target_modules="all-linear")
    expected = model(ids).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, param in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(param.data)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.05)
    resample(model)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
    model.set_adapter("ref")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    storages = [t.untyped_storage().data_ptr() for t in model.state_dict().values() if t.numel()]
    tied = len(storages) - len(set(storages))
    assert tied == len(model.get_base_model()._tied_weights_keys or ())


def test_torchs_fast_path_of_an_encoder_layer_is_not_taken():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(encoder, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        model = attach(encoder, target_modules=["linear1", "linear2"]).eval()
        found = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])


def test_offloaded_weights_are_refused():
    base = nn.Sequential(nn.Linear(4, 4))
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="the weight of 0 is offloaded"):
        attach(base, target_modules=["0"])


def test_a_model_that_is_offloaded_later_does_not_compute_garbage():
    base = nn.Sequential(nn.Linear(4, 4))
    model = attach(base, target_modules=["0"])
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="the factors of layer 0 are not in memory"):
        model(torch.randn(2, 4))


def test_mixed_batches_of_adapters_are_refused():
    model = attach(tiny_bert(), target_modules=["query"], task_type="SEQ_CLS").eval()
    with pytest.raises(ValueError, match="cannot mix adapters in a batch"):
        model(torch.randint(50, (2, 4)), adapter_names=["default", "__base__"])


def test_two_adapters_cannot_both_train_biases():
    model = attach(Mlp(), target_modules=["first"], bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("b", RosaConfig(r=1, target_modules=["first"], bias="all"))


def test_draws_repeat_and_do_not_depend_on_other_layers():
    base = Mlp()

    def first_factor(seed, targets):
        torch.manual_seed(int(torch.randint(1000, ())))
        model = attach(copy.deepcopy(base), target_modules=targets, seed=seed)
        return dict(rosa_layers(model))["base_model.model.first"].rosa_A["default"]

    expected = first_factor(0, ["first"])
    assert torch.equal(first_factor(0, ["first", "last"]), expected)
    assert not torch.equal(first_factor(1, ["first"]), expected)


def test_nothing_warns_on_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = attach(Mlp(), target_modules=["first"])
        watch(model)
        model(torch.randn(4, 7).double()).sum().backward()
        resample(model)
        model.merge_and_unload()


class Headed(nn.Module):
    """A body and heads whose names end alike, one of them with layers of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.pre_classifier = nn.Linear(4, 4)
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.classifier(self.pre_classifier(self.body(x)))


@pytest.mark.parametrize("targets", ["all-linear", ["0", "1", "2", "pre_classifier"], r".*"])
@pytest.mark.parametrize(
    "how",
    [{"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}, {"task_type": "TOKEN_CLS"}],
)
def test_modules_trained_in_full_are_not_adapted_too(targets, how):
    base, x = Headed(), torch.randn(3, 4)
    if targets == r".*":
        targets = r".*(\d|classifier)"
    model = get_peft_model(copy.deepcopy(base), RosaConfig(r=2, target_modules=targets, **how))
    assert names(model) == ["body.0", "body.1"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "rosa_" not in n}
    assert any(".pre_classifier.modules_to_save" in n for n in trained)
    assert any(".classifier.modules_to_save.default.2" in n for n in trained)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p), alpha=0.1)
    inner = model.base_model.model
    expected = inner(x)
    model.add_adapter("b", RosaConfig(r=1, target_modules=targets, **how))
    assert names(model) == ["body.0", "body.1"]
    for plain in (copy.deepcopy(model).merge_and_unload(), copy.deepcopy(model).unload()):
        assert {k: type(m) for k, m in plain.named_modules()} == {
            k: type(m) for k, m in base.named_modules()
        }
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_nothing_left_to_adapt_is_said():
    base = Headed()
    with pytest.raises(NoMatchingPeftModuleError, match=r"trained in full already.*SEQ_CLS"):
        attach(base, target_modules=["pre_classifier"], task_type="SEQ_CLS")
    config = RosaConfig(target_modules="all-linear", modules_to_save=["body", "classifier"])
    with pytest.raises(NoMatchingPeftModuleError, match=r"nothing is left to adapt.*body"):
        get_peft_model(base, config)
    assert type(base.classifier) is nn.Sequential
    assert config.target_modules == "all-linear"


def test_one_adapter_cannot_train_in_full_what_another_adapts():
    model = attach(Headed(), target_modules=["0"])
    with pytest.raises(
        ValueError, match=r"classifier\.0 would be trained in full.*another adapter"
    ):
        model.add_adapter("b", RosaConfig(target_modules=["1"], modules_to_save=["classifier"]))
    model = attach(Headed(), target_modules=["body.0"], modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"is trained by another adapter .* or lies"):
        model.add_adapter("b", RosaConfig(target_modules="all-linear"))


def test_linear_layers_by_class_that_compute_something_else_are_left_out():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class SameByOtherWords(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), SameByOtherWords(4, 4))
    with pytest.warns(UserWarning, match=r"all-linear leaves out 1: of a class"):
        assert names(attach(copy.deepcopy(model), target_modules="all-linear")) == ["0", "2"]
    with pytest.raises(ValueError, match="1 is a Doubled, which is not supported"):
        attach(model, target_modules=["0", "1"])


def test_a_head_that_peft_cannot_save_is_not_adapted():
    build = ARCHITECTURES["wav2vec2-ctc"].build
    with pytest.warns(UserWarning, match="all-linear leaves out lm_head"):
        assert "lm_head" not in names(attach(build(0), target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"lm_head of a Wav2Vec2ForCTC cannot be adapted"):
        attach(build(0), target_modules=["lm_head", "q_proj"])


def test_norms_whose_statistics_no_file_holds_are_named():
    def model():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    with pytest.warns(UserWarning, match="1 norms such as 1 keep running statistics"):
        get_peft_model(model(), RosaConfig(r=2, target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(model(), RosaConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), RosaConfig(r=2, target_modules=["0"]))
