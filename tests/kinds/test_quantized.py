"""Quantized layers: the weight is never touched, and nothing that was learned is rounded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from rosa import RosaConfig, export_lora, export_merged, resample, watch
from rosa.bench.setup.quantizing import quantize as quantize_base
from rosa.kinds.quantized import RosaQuantizedLinear
from rosa.layers.in_model import rosa_layers
from rosa.packing import keep_order
from tests.helpers import moved
from tests.models import tiny_bert

SIZES = 64, 128, 64
RANK = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZES[0], SIZES[1])
        self.second = nn.Linear(SIZES[1], SIZES[2], bias=False)
        self.head = nn.Linear(SIZES[2], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def _each(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith(("head", "classifier")):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def _by_bitsandbytes(model: nn.Module, kind: str, **how: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        shape = linear.in_features, linear.out_features, linear.bias is not None
        found = getattr(bnb.nn, kind)(*shape, **how)
        found.load_state_dict(linear.state_dict())
        return found.to("cpu")

    return _each(model, make)


def in_4_bits(model: nn.Module) -> nn.Module:
    how = {"compute_dtype": torch.float32, "quant_type": "nf4"}
    found = _by_bitsandbytes(model, "Linear4bit", **how)
    keep_order(found)  # its outputs are those of its weights, on any CPU
    return found


def in_8_bits(model: nn.Module) -> nn.Module:
    return _by_bitsandbytes(model, "Linear8bitLt", has_fp16_weights=False)


def by_hqq(model: nn.Module) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    how = {"compute_dtype": torch.float32, "device": "cpu"}
    return _each(model, lambda linear: hqq.HQQLinear(linear, config, **how))


def by_torchao(model: nn.Module) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(
        model,
        torchao.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "head" not in name,
    )
    return model


@pytest.fixture(params=[in_4_bits, in_8_bits, by_hqq, by_torchao])
def quantize(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return request.param


@pytest.fixture
def base(quantize, _fresh_random_inputs: None) -> nn.Module:
    with torch.no_grad():
        return quantize(Net()).requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will be cast from.*")
        yield


def attach(base: nn.Module, **options: Any) -> Any:
    options = {"r": RANK, "alpha": 2.0, "target_modules": ["first", "second"], **options}
    return get_peft_model(base, RosaConfig(**options))


def layers(model: nn.Module) -> list[RosaQuantizedLinear]:
    found = [layer for _, layer in rosa_layers(model)]
    assert found
    assert all(isinstance(layer, RosaQuantizedLinear) for layer in found)
    return found  # type: ignore[return-value]


def test_when_an_offset_is_compressed_is_known_from_the_offset_alone(base):
    """So a resumed training draws as the one that was not interrupted."""
    plain = copy.deepcopy(base)
    model = attach(base)
    for _ in range(8):
        moved(model, 0.05)
        resample(model)
        again = attach(copy.deepcopy(plain))
        set_peft_model_state_dict(again, copy.deepcopy(get_peft_model_state_dict(model)))
        offsets = []
        for each in (copy.deepcopy(model), again):
            torch.manual_seed(0)
            moved(each, 0.05)
            resample(each)
            offsets.append([layer.adapters["default"].terms for layer in layers(each)])
        for one, other in zip(*offsets, strict=True):
            assert torch.equal(one.A, other.A)
            assert torch.equal(one.B, other.B)


@pytest.mark.parametrize("trained", ["both", "B"])
def test_it_computes_the_quantized_layer_plus_the_whole_change(base, trained):
    model = attach(base, trained=trained)
    for _ in range(3):
        moved(model, 0.05)
        resample(model)
    moved(model, 0.05)
    for layer in layers(model):
        x = torch.randn(7, layer.in_features, requires_grad=True)
        change = layer.whole_change("default").dense()
        inner = layer.get_base_layer()
        expected = inner(x) + x @ change.T
        found = layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        of = torch.randn_like(found)
        (gradient,) = torch.autograd.grad((found * of).sum(), x, retain_graph=True)
        (wanted,) = torch.autograd.grad((expected * of).sum(), x)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
        a, b = layer.adapters["default"].factors
        s = layer.adapters["default"].scaling
        learned = [f for f in (a, b) if f.requires_grad]
        gradients = {id(a): s * b.T @ of.T @ x, id(b): s * of.T @ x @ a.T}
        for factor, g in zip(
            learned, torch.autograd.grad((found * of).sum(), learned), strict=True
        ):
            torch.testing.assert_close(g, gradients[id(factor)], rtol=1e-4, atol=1e-4)


def test_nothing_is_written_and_draws_keep_the_outputs(base):
    x = torch.randn(6, SIZES[0])
    with torch.no_grad():
        before = base(x)
        stored = {k: v.clone() for k, v in base.state_dict().items() if isinstance(v, Tensor)}
        model = attach(base)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(model(x), before, **close)
        for _ in range(12):
            moved(model, 0.05)
            learned = model(x)
            changes = [layer.whole_change("default").dense() for layer in layers(model)]
            assert resample(model) == 2
            for layer, change in zip(layers(model), changes, strict=True):
                lost = layer.whole_change("default").dense() - change
                assert float(lost.norm()) <= 2**-12 * float(change.norm()) + 1e-4
            torch.testing.assert_close(model(x), learned, rtol=1e-3, atol=5e-3)
        learned = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        torch.testing.assert_close(model(x), learned, **close)
        model.merge_adapter()
        torch.testing.assert_close(model(x), learned, **close)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), learned, **close)
        torch.testing.assert_close(copy.deepcopy(model)(x), learned, **close)
        for layer in layers(model):  # the cost of a pass is bounded
            assert layer.adapters["default"].terms.rank <= 1.5 * min(SIZES) + 4 * RANK
        unloaded = model.unload()
        torch.testing.assert_close(unloaded(x), before, rtol=0, atol=0)
        for key, value in unloaded.state_dict().items():
            if isinstance(value, Tensor):
                assert torch.equal(
                    value.dequantize() if hasattr(value, "dequantize") else value,
                    stored[key].dequantize() if hasattr(value, "dequantize") else stored[key],
                )


def test_it_learns_is_saved_loaded_and_takes_turns(base, tmp_path):
    x, target = torch.randn(16, SIZES[0]), torch.randn(16, 5)
    plain = copy.deepcopy(base)
    model = attach(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    watch(model)
    losses = []
    for step in range(30):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            resample(model, optimizer)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        close = {"rtol": 1e-4, "atol": 1e-4}
        learned = model(x)
        model.save_pretrained(tmp_path / "adapter")
        for low in (False, True):
            loaded = PeftModel.from_pretrained(
                copy.deepcopy(plain), tmp_path / "adapter", low_cpu_mem_usage=low
            )
            torch.testing.assert_close(loaded(x), learned, **close)
        export_lora(model, tmp_path / "lora")
        with pytest.raises(ValueError, match="is quantized, and merging into it would round"):
            export_merged(model, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        lora = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora")
        torch.testing.assert_close(lora(x), learned, **close)
        state = copy.deepcopy(get_peft_model_state_dict(model))
        model.add_adapter("other", RosaConfig(r=2, target_modules=["first"]))
        model.set_adapter("other")
        torch.testing.assert_close(model(x), plain(x), **close)
        model.set_adapter("default")
        torch.testing.assert_close(model(x), learned, **close)
        model.delete_adapter("other")
        moved(model, 0.05)
        resample(model)
        set_peft_model_state_dict(model, state)
        torch.testing.assert_close(model(x), learned, **close)


def seen_as(seen: dict[str, Tensor]) -> Callable[[Tensor], None]:
    return lambda gradient: seen.update(g=gradient)


def test_what_is_watched_is_the_gradient_of_the_weight(base):
    model = attach(base)
    watch(model)
    first, second = layers(model)
    x = torch.randn(6, SIZES[0])
    seen: dict[str, Tensor] = {}
    first.register_forward_hook(lambda _, __, out: out.register_hook(seen_as(seen)) and None)
    model(x).square().sum().backward()
    sketch = first.adapters["default"].sketch
    assert sketch is not None
    torch.testing.assert_close(sketch.total.T, seen["g"].T @ x @ sketch.test, rtol=1e-3, atol=1e-4)
    assert second.adapters["default"].sketch is not None


def test_merging_for_good_quantizes_again_and_says_so(quantize):
    with torch.no_grad():
        base = quantize(Net()).requires_grad_(False).eval()
        model = attach(base)
        moved(model, 0.05)
        resample(model)
        wanted = [
            layer.base_weight.present() + layer.adapters["default"].learned().dense()
            for layer in layers(model)
        ]
        if quantize is by_torchao:
            with pytest.raises(
                ValueError, match="merging into weights of torchao needs the config"
            ):
                model.merge_and_unload()
            return
        kinds = [type(layer.get_base_layer()) for layer in layers(model)]
        with pytest.warns(UserWarning, match="quantized again, which rounds"):
            merged = model.merge_and_unload()
        assert [type(merged.first), type(merged.second)] == kinds
        again = quantize(Net())
        for name, weight in zip(("first", "second"), wanted, strict=True):
            layer = attach(merged, target_modules=[name]).base_model.model.get_submodule(name)
            found = layer.pretrained_weight()
            error = float((found - weight).norm() / weight.norm())
            assert error < 0.2
            assert type(again.get_submodule(name)) is type(layer.get_base_layer())


def test_a_quantized_transformer_trains_beside_a_qlora(quantize):
    ids = torch.randint(1, 50, (4, 9))
    labels = torch.randint(2, (4,))
    kept = {}
    with torch.no_grad():
        quantized = quantize(tiny_bert()).requires_grad_(False)
    # PEFT's "all-linear" does not know HQQ's layers.
    targets: Any = ["query", "value", "dense"] if quantize is by_hqq else "all-linear"
    for name, config in {
        "rosa": RosaConfig(r=4, target_modules=targets, task_type="SEQ_CLS"),
        "lora": LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS"),
    }.items():
        if name == "lora" and quantize is by_torchao:
            continue  # PEFT's wants a config that a model of transformers holds
        base = prepare_model_for_kbit_training(copy.deepcopy(quantized))
        base.config.pad_token_id = 0
        model: Any = get_peft_model(base, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(24):
            loss = model(input_ids=ids, labels=labels).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept[name] = losses[-1]
        assert losses[-1] < 0.7 * losses[0]
        if name == "rosa":
            assert resample(model, optimizer) > 6


def test_of_many_quantized_weights_none_is_taken_for_another(quantize, tmp_path, recwarn):
    """And those of another model are told."""
    whole, another = (nn.Sequential(*(nn.Linear(32, 32) for _ in range(128))) for _ in range(2))
    with torch.no_grad():
        base = quantize(copy.deepcopy(whole)).requires_grad_(False)
    attach(base, target_modules=r"\d+", directions="orthonormal").save_pretrained(tmp_path)
    for plain, is_told in ((whole, False), (another, True)):
        recwarn.clear()
        PeftModel.from_pretrained(plain, tmp_path)
        assert is_told == any("other base weights" in str(w.message) for w in recwarn)


def test_an_adapter_goes_from_the_quantized_to_the_whole_model(quantize, tmp_path, recwarn):
    whole = Net()
    with torch.no_grad():
        base = quantize(copy.deepcopy(whole)).requires_grad_(False)
    model = attach(base)
    moved(model, 0.05)
    resample(model)
    model.save_pretrained(tmp_path)
    recwarn.clear()
    loaded = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path)
    assert not [w for w in recwarn if "other base weights" in str(w.message)]
    for (_, one), (_, other) in zip(rosa_layers(model), rosa_layers(loaded), strict=True):
        torch.testing.assert_close(
            one.whole_change("default").dense(), other.whole_change("default").dense()
        )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["passed", "saved"])
def test_4_bit_weights_that_a_pass_has_packed_are_put_back(nested, how):
    bnb = pytest.importorskip("bitsandbytes")
    how_made = {"compute_dtype": torch.float32, "compress_statistics": nested}
    with torch.no_grad():
        base = _by_bitsandbytes(Net(), "Linear4bit", **how_made).requires_grad_(False).eval()
    linears = [base.first, base.second]
    stored = [linear.weight.detach().clone() for linear in linears]
    whole = [dequantized(linear) for linear in linears]
    for linear in linears:  # as its forward does on a CPU with AVX512-BF16
        packed, _ = bnb.functional._convert_weight_packed_for_cpu(
            linear.weight.data, linear.weight.quant_state
        )
        linear.weight.data = packed
    assert (dequantized(base.first) - whole[0]).abs().max() > 0.01
    if how == "saved":
        base.state_dict()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = attach(base)
    assert ("rounded the scales of 2" in "".join(str(w.message) for w in said)) == (how == "passed")
    for linear, codes, expected in zip(linears, stored, whole, strict=True):
        assert torch.equal(linear.weight, codes)
        close = {"rtol": 0.05 if nested else 2**-8, "atol": 1e-3 if nested else 0.0}
        torch.testing.assert_close(dequantized(linear), expected, **close)
    moved(model)
    with torch.no_grad():
        assert model(torch.randn(3, SIZES[0])).isfinite().all()


def dequantized(linear: Any) -> Tensor:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).clone()


@pytest.mark.parametrize("adapter", [RosaConfig, LoraConfig])
@pytest.mark.parametrize("targets", [["first"], ["first", "second"]])
def test_an_evaluation_leaves_4_bit_weights_and_gradients_as_they_were(adapter, targets):
    """LoRA as the commands load its model."""
    with torch.no_grad():
        base = _by_bitsandbytes(Net(), "Linear4bit", compute_dtype=torch.float32)
    if adapter is LoraConfig:
        quantize_base("4bit", base)
    model = get_peft_model(base, adapter(r=RANK, target_modules=targets))
    moved(model)
    x = torch.randn(3, SIZES[0])

    def gradients() -> list[Tensor]:
        factors = [p for p in model.train().parameters() if p.requires_grad]
        return list(torch.autograd.grad(model(x).square().sum(), factors))

    before = gradients()
    stored = [linear.weight.detach().clone() for linear in bare_linears(model)]
    with torch.no_grad():
        model.eval()(x)
    assert all(map(torch.equal, (linear.weight for linear in bare_linears(model)), stored))
    for one, other in zip(gradients(), before, strict=True):
        torch.testing.assert_close(one, other)


def bare_linears(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "weight")]
