"""Parameters named by themselves: stacks of experts, each of which has a subspace of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rosa import RosaConfig, export_lora, export_merged, resample, watch
from rosa.algebra import subspace
from rosa.algebra.lowrank import LowRank
from rosa.kinds.parameter import ParamWrapper
from rosa.layers.in_model import rosa_layers
from tests.helpers import moved
from tests.models import EXPERTS, IN, OUT, Experts, Mixture

RANK = 3


@pytest.fixture(params=[False, True], ids=["out-in", "in-out"])
def base(request: pytest.FixtureRequest, _fresh_random_inputs: None) -> Mixture:
    return Mixture(request.param)


def attach(base: nn.Module, **options: Any) -> Any:
    names = ["experts.up", "experts.mix"]
    options = {"r": RANK, "alpha": 2.0, "target_parameters": names, "target_modules": [], **options}
    return get_peft_model(base, RosaConfig(**options), autocast_adapter_dtype=False)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(12, IN).double(), torch.arange(12) % EXPERTS


def layers(model: nn.Module) -> dict[str, ParamWrapper]:
    found = dict(rosa_layers(model))
    assert all(isinstance(layer, ParamWrapper) for layer in found.values())
    return {layer.parameter_name: layer for layer in found.values()}  # type: ignore[misc]


@pytest.mark.parametrize("trained", ["both", "B"])
def test_outputs_and_gradients_are_those_of_the_changed_weights(base, trained):
    x = inputs()
    model = attach(base, trained=trained)
    moved(model)
    leaves, tensors = [], {}
    for name, layer in layers(model).items():
        a, b = (factor.detach().clone() for factor in layer.adapters["default"].factors)
        leaves += (
            [b.requires_grad_()] if trained == "B" else [a.requires_grad_(), b.requires_grad_()]
        )
        delta = 2.0 / RANK * b @ a
        stored = delta.mT if base.experts.is_transposed and name == "up" else delta
        tensors[f"experts.{name}"] = layer.base_weight.parameter.detach() + stored
    plain = Mixture(base.experts.is_transposed)
    one, other = (x[0].clone().requires_grad_() for _ in range(2))
    expected = torch.func.functional_call(plain, tensors, (other, x[1]))
    found = model(one, x[1])
    torch.testing.assert_close(found, expected)
    of = torch.randn_like(found)
    factors = [
        factor
        for layer in layers(model).values()
        for factor in layer.adapters["default"].factors
        if factor.requires_grad
    ]
    torch.testing.assert_close(
        torch.autograd.grad((found * of).sum(), [one, *factors]),
        torch.autograd.grad((expected * of).sum(), [other, *leaves]),
    )


@pytest.mark.parametrize("directions", ["svd", "orthonormal", "gradient", "zero"])
def test_each_expert_is_drawn_as_a_weight_by_itself(base, directions):
    model = attach(base, directions=directions)
    layer = layers(model)["up"]
    one = layer.adapters["default"]
    for draw in range(3):
        whole = _drawn_again(model, layer) if draw else layer.pretrained_weight()
        a, b = (factor.detach() for factor in one.factors)
        assert a.shape == (EXPERTS, RANK, IN)
        assert b.shape == (EXPERTS, OUT, RANK)
        for w, part, u in zip(whole, one.scaling * b @ a, b, strict=True):
            if directions == "zero":
                assert not part.any()
                continue
            assert torch.linalg.matrix_rank(part) == RANK
            if directions == "svd":  # what is left has all other triplets as they were
                left = torch.linalg.svdvals(w - part)
                sizes = torch.linalg.svdvals(w)
                rest = min(w.shape) - RANK
                assert all(((sizes - size).abs() < 1e-8).any() for size in left[:rest])
                assert (left[rest:] < 1e-8).all()
            # The part of the weight in its own subspace, on one side or on the other.
            left = torch.linalg.qr(u).Q
            right = torch.linalg.svd(part).Vh[:RANK].T
            in_outputs, in_inputs = left @ left.T @ w, w @ right @ right.T
            assert torch.allclose(part, in_outputs) or torch.allclose(part, in_inputs)
    subspaces = [torch.linalg.qr(u).Q for u in one.factors[1].detach()]
    if directions != "zero":
        assert not torch.allclose(subspaces[0] @ subspaces[0].T, subspaces[1] @ subspaces[1].T)


def _drawn_again(model: Any, layer: ParamWrapper) -> Tensor:
    moved(model)
    change = layer.whole_change("default")
    whole = layer.pretrained_weight() + change.dense()
    resample(model)
    return whole


def test_draws_of_a_stack_by_known_directions_hold_them():
    weight = torch.randn(3, 8, 5, dtype=torch.float64)
    known = [torch.linalg.qr(torch.randn(8, k).double()).Q for k in (0, 1, 3)]
    generator = subspace.generator(0, "layer", 0)
    change = LowRank(torch.randn(3, 8, 2).double(), torch.randn(3, 2, 5).double())
    a, b = subspace.draw(
        weight, 3, directions="gradient", known=known, change=change, generator=generator
    )
    for w, u, rows, held, extra in zip(weight, b, a, known, change.dense(), strict=True):
        torch.testing.assert_close(u.T @ u, torch.eye(3).double())
        torch.testing.assert_close(u @ (u.T @ held), held)
        torch.testing.assert_close(u @ rows, u @ u.T @ (w + extra))


def test_what_is_watched_is_the_gradient_of_each_expert(base):
    x, chosen = inputs()
    chosen = chosen % (EXPERTS - 1)  # the last one sees nothing
    model = attach(base)
    assert watch(model) == 2
    model(x, chosen).square().sum().backward()
    layer = layers(model)["up"]
    adapter = layer.adapters["default"]
    weight = layer.changed_weight().detach().requires_grad_()
    plain = Mixture(base.experts.is_transposed)
    mix = layers(model)["mix"].changed_weight().detach()
    out = torch.func.functional_call(plain, {"experts.up": weight, "experts.mix": mix}, (x, chosen))
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    gradient = layer.base_weight.view.as_matrix(gradient)
    assert adapter.sketch is not None
    found = adapter.sketch.directions(RANK, like=gradient)
    assert [u.shape[1] for u in found] == [*(min(RANK, 4) for _ in found[:-1]), 0]
    for u, g in zip(found[:-1], gradient, strict=False):
        best = torch.linalg.svd(g).U[:, :RANK]
        share = (u.T @ g).norm() / (best.T @ g).norm()
        torch.testing.assert_close(share, torch.ones_like(share))  # as many projections as inputs
    resample(model)


def test_it_starts_as_it_was_and_draws_keep_the_outputs(base):
    x = inputs()
    before = base(*x)
    pretrained = copy.deepcopy(base.state_dict())
    model = attach(base)
    torch.testing.assert_close(model(*x), before)
    for _ in range(12):  # past where the offset is compressed
        moved(model)
        learned = model(*x)
        assert resample(model) == 2
        torch.testing.assert_close(model(*x), learned)
    most = 1.5 * min(OUT, IN) + 2 * RANK
    assert all(one.adapters["default"].terms.rank <= most for one in layers(model).values())
    with model.disable_adapter():
        torch.testing.assert_close(model(*x), before)
    for name, layer in layers(model).items():
        delta = layer.get_delta_weight("default")
        assert delta.shape == getattr(base.experts.get_base_layer(), name).shape
    learned = model(*x)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.experts) is Experts
    torch.testing.assert_close(merged(*x), learned)
    unloaded = model.unload()
    assert type(unloaded.experts) is Experts
    torch.testing.assert_close(dict(unloaded.state_dict()), dict(pretrained))


def test_a_model_that_reads_the_parameter_sees_the_changed_one(base):
    model = attach(base)
    moved(model)
    experts = model.base_model.model.experts
    for name, layer in layers(model).items():
        change = layer.base_weight.view.as_stored(layer.adapters["default"].learned().dense())
        expected = layer.base_weight.parameter + change
        torch.testing.assert_close(getattr(experts, name) + 0, expected)


def test_adapters_take_turns_and_are_saved_and_loaded(base, tmp_path):
    x = inputs()
    plain = copy.deepcopy(base)
    before = base(*x)
    model = attach(base)
    options = {"target_parameters": ["experts.mix", "experts.up"], "target_modules": []}
    model.add_adapter("other", RosaConfig(r=2, **options))
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        torch.testing.assert_close(model(*x), before if name == "other" else model(*x))
        moved(model)
        resample(model)
        moved(model)
        outputs[name] = model(*x)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(model(*x), outputs[name])
    state = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder)
        torch.testing.assert_close(loaded(*x), outputs[name])
    moved(model)
    resample(model)
    model.load_state_dict(state)
    torch.testing.assert_close(model(*x), outputs["default"])
    model.delete_adapter("other")
    torch.testing.assert_close(model(*x), outputs["default"])
    model.add_adapter("third", RosaConfig(r=1, **options))
    model.add_weighted_adapter(["default", "third"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(*x), outputs["default"])


@pytest.mark.parametrize("first", [True, False])
def test_a_sum_of_adapters_of_parameters_and_of_modules(base, first):
    model_of = nn.Sequential()
    model_of.mixture, model_of.out = base, nn.Linear(IN, IN).double()

    def forward(x: tuple[Tensor, Tensor]) -> Tensor:
        return model.base_model.model.out(model.base_model.model.mixture(*x))

    options: dict[str, Any] = {"r": 2, "target_modules": []}
    parameters = RosaConfig(**options, target_parameters=["experts.up", "experts.mix"])
    modules = RosaConfig(r=3, target_modules=["out"])
    one, two = (parameters, modules) if first else (modules, parameters)
    model: Any = get_peft_model(model_of, one, "one", autocast_adapter_dtype=False)
    model.add_adapter("two", two, autocast_adapter_dtype=False)
    model.base_model.set_adapter(["one", "two"])
    moved(model)
    resample(model)
    moved(model)
    x = inputs()
    expected = forward(x)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(forward(x), expected)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=4)
    return MixtralForCausalLM(config)


def qwen() -> PreTrainedModel:
    sizes = {"head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, **sizes, num_experts=6, num_experts_per_tok=2)
    )


def gpt_oss() -> PreTrainedModel:
    sizes = {"head_dim": 8, "intermediate_size": 40, "num_local_experts": 4}
    return GptOssForCausalLM(GptOssConfig(**SMALL, **sizes, num_experts_per_tok=2))


@pytest.mark.parametrize("make", [mixtral, qwen, gpt_oss])
def test_a_mixture_of_experts_goes_all_the_way(make: Callable[[], PreTrainedModel], tmp_path):
    base = make().eval()
    plain = copy.deepcopy(base)
    ids = torch.randint(64, (2, 16))
    before = base(ids).logits
    config = RosaConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
    )
    model: Any = get_peft_model(base, config).eval()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(model(ids).logits, before, **close)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(9):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            learned = model(ids).logits.detach()
            assert resample(model, optimizer) == 6
            torch.testing.assert_close(model(ids).logits, learned, **close)
    assert losses[-1] < losses[0] - 0.05
    learned = model(ids).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, learned, **close)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()
    torch.testing.assert_close(lora(ids).logits, learned, **close)
    export_merged(model, tmp_path / "merged")
    merged = type(plain).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, learned, **close)


def test_parameters_without_modules_need_no_choice_of_modules():
    model = get_peft_model(
        Mixture(False), RosaConfig(r=2, target_parameters=["up"])
    )  # of no architecture that PEFT knows
    assert list(layers(model)) == ["up"]


def test_bad_parameters_are_refused_before_anything_has_changed(base):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts(False)
            self.inside = nn.Module()
            self.inside.flat = nn.Parameter(torch.randn(5))
            self.inside.deep = nn.Parameter(torch.randn(2, 3, 4, 5))
            self.inside.broken = nn.Parameter(torch.full((2, 4, 4), float("nan")))
            self.inside.linear = nn.Linear(4, 4)
            self.own = nn.Parameter(torch.randn(3, 3))

    def refused(message: str, kind: type[Exception] = ValueError, **options: Any) -> None:
        model = Odd()
        with pytest.raises(kind, match=message):
            attach(model, **options)
        assert not list(rosa_layers(model))
        assert not any("rosa" in key for key in model.state_dict())

    refused("must be a list", TypeError, target_parameters="experts.up")
    refused("flat has 1 dimensions", target_parameters=["inside.flat"])
    refused("deep has 4 dimensions", target_parameters=["inside.deep"])
    refused("broken has NaN", target_parameters=["experts.up", "inside.broken"])
    refused("own is a parameter of the model itself", target_parameters=["own"])
    refused("leave rosa_dropout at 0", rosa_dropout=0.1)
    refused(
        "has no parameter experts.upp.*Did you mean experts.up", target_parameters=["experts.upp"]
    )
    refused(
        "adapted as a whole",
        target_modules=["linear"],
        target_parameters=["linear.weight"],
    )
    model = attach(base)
    with pytest.raises(ValueError, match="must be the same for all adapters"):
        model.add_adapter("other", RosaConfig(target_parameters=["experts.up"], target_modules=[]))
    with pytest.raises(ValueError, match="a parameter of experts is adapted by itself"):
        model.add_adapter("other", RosaConfig(target_modules=["experts"]))
    assert list(layers(model)["up"].adapters) == ["default"]
