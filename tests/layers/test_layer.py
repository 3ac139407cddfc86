"""One adapted weight: the forward pass, the training and the draws against the plain reference."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import prune

from rosa import RosaConfig, resample
from rosa.algebra import subspace
from rosa.layers.in_model import rosa_layers
from tests.models import Mlp
from tests.reference import ReferenceRosa


def adapt(model, **options):
    options.setdefault("target_modules", ["first", "middle", "last"])
    return get_peft_model(model, RosaConfig(**{"r": 2, **options}))


def layer_of(model, name):
    return dict(rosa_layers(model))[f"base_model.model.{name}"]


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_training_follows_the_plain_algorithm_through_resamples(alpha):
    base, x, y = Mlp(), torch.randn(20, 7).double(), torch.randn(20, 3).double()
    scaling = 1.0 if alpha is None else alpha / 2
    references = {
        "first": ReferenceRosa(base.first.weight.detach(), 2, scaling),
        "middle": ReferenceRosa(base.middle.weight.detach().T, 2, scaling),
        "last": ReferenceRosa(base.last.weight.detach(), 2, scaling),
    }
    biases = {name: getattr(base, name).bias.detach().clone() for name in references}

    def reference_forward(inputs):
        for name, reference in references.items():
            inputs = inputs @ reference.weight().T + biases[name]
            inputs = inputs if name == "last" else torch.tanh(inputs)
        return inputs

    model = adapt(base, directions="svd", alpha=alpha, seed=5)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(factors, lr=0.02)
    for round_ in range(4):
        for name, reference in references.items():
            generator = subspace.generator(5, f"{name}.default", round_)
            count = min(reference.fixed.shape)
            reference.factor(torch.randperm(count, generator=generator)[:2].sort().values)
        if round_:
            assert resample(model, optimizer) == 3
        reference_factors = [f for r in references.values() for f in (r.A, r.B)]
        reference_optimizer = torch.optim.Adam(reference_factors, lr=0.02)
        for _ in range(5):
            for forward, steps in ((model, optimizer), (reference_forward, reference_optimizer)):
                steps.zero_grad()
                (forward(x) - y).square().mean().backward()
                steps.step()
        torch.testing.assert_close(model(x), reference_forward(x), rtol=1e-9, atol=1e-9)
        for name, reference in references.items():
            layer = layer_of(model, name)
            change = layer.whole_change("default").dense()
            torch.testing.assert_close(
                layer.pretrained_weight() + change, reference.weight(), rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("directions", subspace.DIRECTIONS)
def test_a_fresh_adapter_leaves_the_outputs_as_they_are(directions, dropout):
    base, x = Mlp(), torch.randn(4, 5, 7).double()
    expected = base(x)
    model = adapt(base, directions=directions, rosa_dropout=dropout, alpha=3)
    torch.testing.assert_close(model.eval()(x), expected)
    if dropout and directions != "zero":
        assert not torch.allclose(model.train()(x), expected)


@pytest.mark.parametrize("name", ["first", "middle"])
def test_gradients_of_a_layer(name):
    layer = layer_of(adapt(Mlp(), alpha=1), name)
    layer.requires_grad_(True)
    x = torch.randn(3, 2, layer.in_features, dtype=torch.float64, requires_grad=True)
    factors = (layer.rosa_A["default"], layer.rosa_B["default"])
    assert torch.autograd.gradcheck(lambda inputs, *_: layer(inputs), (x, *factors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_are_drawn_in_float32_and_keep_their_dtype(dtype):
    base, x = Mlp(dtype), torch.randn(16, 7, dtype=dtype)
    expected, weight = base(x).float(), base.first.weight.detach().float()
    model = adapt(base)
    layer = layer_of(model, "first")
    assert layer.get_base_layer().weight.dtype == dtype
    assert layer.rosa_A["default"].dtype == torch.float32
    assert layer.adapters["default"].terms.A.dtype == torch.float32
    assert model(x).dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model(x).float(), expected, rtol=8 * eps, atol=8 * eps)
    for _ in range(50):  # the rounding of resamples must not add up
        resample(model)
    torch.testing.assert_close(model(x).float(), expected, rtol=16 * eps, atol=16 * eps)
    with model.disable_adapter():
        assert torch.equal(layer.weight.float(), weight)  # exactly, whatever the resamples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabling_a_thousand_times_does_not_drift(dtype):
    model = adapt(Mlp(dtype), target_modules=["first"])
    layer = layer_of(model, "first")
    with model.disable_adapter():
        once = layer.weight.detach().clone()
    enabled = layer.weight.detach().clone()
    for _ in range(1000):
        with model.disable_adapter():
            pass
    assert torch.equal(layer.weight, enabled)
    with model.disable_adapter():
        assert torch.equal(layer.weight, once)


def switch(model):
    model.set_adapter("other")
    model.set_adapter("default")


def merge(model):
    model.merge_adapter(["default"])
    model.unmerge_adapter()


@pytest.mark.parametrize("turn", [switch, merge])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_that_take_turns_do_not_drift(dtype, turn):
    base = Mlp(dtype)
    weight = base.first.weight.detach().clone()
    model = adapt(base)
    model.add_adapter("other", RosaConfig(r=3, target_modules=["first"], seed=1))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    turn(model)
    layer = layer_of(model, "first")
    first = layer.weight.detach().clone()
    for _ in range(200):
        turn(model)
    assert torch.equal(layer.weight, first)
    model.delete_adapter("other")
    model.unload()
    once = 0 if dtype in (torch.float16, torch.bfloat16) else torch.finfo(dtype).eps
    torch.testing.assert_close(layer.base_layer.weight, weight, rtol=once, atol=2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_others_write_into_the_pretrained_weight_stays_there(dtype):
    model = adapt(Mlp(dtype), target_modules=["first"])
    layer = layer_of(model, "first")
    before, x = layer.pretrained_weight(), torch.randn(4, 7, dtype=dtype)
    fingerprint = layer.base_fingerprint()
    with model.disable_adapter(), torch.no_grad():
        layer.base_layer.weight.add_(1.0)
    assert layer.pretrained_weight().mean() > before.mean() + 0.9
    assert layer.base_fingerprint() != fingerprint
    with model.disable_adapter():
        assert layer.weight.float().mean() > before.mean() + 0.9
    assert torch.isfinite(model(x)).all()


def read(model, layer):
    model(torch.randn(4, 7, dtype=layer.base_layer.weight.dtype))


def save(model, layer):
    model.state_dict()


def draw(model, layer):
    resample(model)


@pytest.mark.parametrize("use", [read, save, draw, lambda m, layer: m.merge_adapter()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_into_a_weight_that_holds_an_offset_is_refused(dtype, use):
    model = adapt(Mlp(dtype), target_modules=["first"])
    layer = layer_of(model, "first")
    with torch.no_grad():
        layer.base_layer.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"layer first was changed while ROSA's offset stood in"):
        use(model, layer)


def into_data(layer):
    layer.base_layer.weight.data.add_(1.0)


def other_data(layer):
    layer.base_layer.weight.data = 1.1 * layer.base_layer.weight.data


def from_vector(layer):
    """As a sweep over directions in weight space does; it writes by `.data`."""
    vector = nn.utils.parameters_to_vector(layer.base_layer.parameters())
    nn.utils.vector_to_parameters(0.5 * vector, layer.base_layer.parameters())


def from_numpy(layer):
    weight = layer.base_layer.weight.detach()
    if weight.dtype == torch.bfloat16:
        weight = weight.view(torch.int16)
    values = weight.numpy()
    values += 1


@pytest.mark.parametrize("use", [save, draw, lambda m, layer: m.merge_adapter()])
@pytest.mark.parametrize("write", [into_data, other_data, from_vector, from_numpy])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_is_a_write_that_autograd_does_not_count(dtype, write, use):
    model = adapt(Mlp(dtype), target_modules=["first"])
    layer = layer_of(model, "first")
    write(layer)
    for _ in range(2):  # it stays so
        with pytest.raises(ValueError, match=r"layer first was changed while ROSA's offset stood"):
            use(model, layer)
    with pytest.warns(UserWarning, match="taken for a change of the pretrained weight"):
        disabled(model)
    use(model, layer)


def in_place(layer):
    with torch.no_grad():
        layer.base_layer.weight.add_(1.0)


def in_its_place(layer):
    other = 2 * layer.base_layer.weight.detach()
    layer.base_layer.weight = nn.Parameter(other, requires_grad=False)


@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.share_memory(), copy.deepcopy, lambda m: m.double()]
)
@pytest.mark.parametrize("write", [in_place, in_its_place, into_data, other_data])
def test_moving_or_copying_the_model_hides_no_write(write, move):
    """As Trainer and Accelerate do before the first step."""
    model = adapt(Mlp(torch.float32), target_modules=["first"])
    write(layer_of(model, "first"))
    with pytest.raises(ValueError, match=r"layer first was changed while ROSA's offset stood in"):
        resample(move(model))


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), nn.Module.double, nn.Module.bfloat16])
def test_a_model_whose_parameters_are_swapped_moves(move):
    model, x = adapt(Mlp(torch.float32), target_modules=["first"]), torch.randn(4, 7)
    with torch.no_grad():  # torch swaps no parameter that a graph holds
        before = model(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        move(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    weight = layer_of(model, "first").base_layer.weight
    torch.testing.assert_close(model(x.to(weight.dtype)).to(x), before, rtol=0.05, atol=0.05)
    assert resample(model) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pretrained_weight_may_be_put_back_so(dtype):
    base = Mlp(dtype)
    pretrained = base.first.weight.detach().clone()
    model = adapt(base, target_modules=["first"])
    layer = layer_of(model, "first")
    layer.base_layer.weight.data.copy_(pretrained)
    with model.disable_adapter():
        assert torch.equal(layer.base_layer.weight, pretrained)
    assert not torch.equal(layer.base_layer.weight, pretrained)  # its offset stands there again


def with_norm(linear):
    nn.utils.parametrizations.weight_norm(linear)


def pruned(linear):
    prune.l1_unstructured(linear, "weight", 0.5)


def in_8_bits(linear):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    "use", [save, draw, lambda m, layer: m.merge_adapter(), lambda m, layer: disabled(m)]
)
@pytest.mark.parametrize("compute", [with_norm, pruned, in_8_bits])
def test_a_weight_that_is_computed_after_attaching_is_refused(compute, use):
    model = adapt(Mlp(torch.float32), target_modules=["first"])
    layer = layer_of(model, "first")
    compute(layer.base_layer)
    why = r"was quantized" if compute is in_8_bits else "is computed from others now"
    with pytest.raises(ValueError, match=f"layer first {why}"):
        use(model, layer)


def test_a_weight_that_was_quantized_after_attaching_may_be_put_back(tmp_path):
    model = adapt(Mlp(torch.float32), target_modules=["first"])
    linear = layer_of(model, "first").base_layer
    before, x = linear.weight, torch.randn(3, 7)
    expected = model(x)
    in_8_bits(linear)
    linear.weight = before
    model.save_pretrained(str(tmp_path))
    assert torch.equal(model(x), expected)


def disabled(model):
    with model.disable_adapter():
        pass


def refilled(model):
    """As peft's set_base_model_state_dict does, which asks for the names first."""
    inner = model.base_model.model
    with pytest.warns(UserWarning, match="as it lies in memory"):
        names = inner.state_dict().keys()
    weights = {n: torch.full_like(p, 0.5) for n, p in inner.named_parameters() if "base" in n}
    assert set(weights) <= set(names)
    inner.load_state_dict(weights, strict=False)


@pytest.mark.parametrize("way", [disabled, refilled, "unload", "delete"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_is_a_way_out_after_such_a_write(dtype, way):
    model = adapt(Mlp(dtype), target_modules=["first"])
    layer, x = layer_of(model, "first"), torch.randn(4, 7, dtype=dtype)
    before = layer.pretrained_weight()
    with torch.no_grad():
        layer.base_layer.weight.add_(1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the weight of layer first was changed")
        if way == "unload":
            model.unload()
        elif way == "delete":
            model.delete_adapter("default")
            assert not model.peft_config
        else:
            way(model)
            assert torch.isfinite(model(x)).all()
            resample(model)
    if way is refilled:
        assert (layer.pretrained_weight() - 0.5).abs().max() < 1e-2
    else:
        weight = layer.base_layer.weight if isinstance(way, str) else layer.pretrained_weight()
        eps = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(weight.float(), before + 1, rtol=0, atol=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_values_or_the_pretrained_ones_may_be_written(dtype):
    base = Mlp(dtype)
    model = adapt(copy.deepcopy(base), target_modules=["first"])
    layer, x = layer_of(model, "first"), torch.randn(4, 7, dtype=dtype)
    expected = model(x)
    with torch.no_grad():
        layer.base_layer.weight.copy_(layer.base_layer.weight.clone())
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        layer.base_layer.weight.copy_(base.first.weight)
    assert torch.equal(model(x), expected)


def test_a_base_weight_that_is_trained_as_well_is_followed():
    model = adapt(Mlp(), target_modules=["first"])
    layer = layer_of(model, "first")
    layer.base_layer.weight.requires_grad_(True)
    before = layer.pretrained_weight()
    with torch.no_grad():
        layer.base_layer.weight.add_(0.5)
    model(torch.randn(4, 7).double())
    torch.testing.assert_close(layer.pretrained_weight(), before + 0.5)


def test_autocast_and_matmul_precision_do_not_touch_the_weights():
    results = []
    for outside in (False, True):
        torch.manual_seed(3)
        model = adapt(Mlp(torch.float32), seed=1)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if outside else "highest")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
            for _ in range(4):
                resample(model)
            model.add_adapter("other", RosaConfig(r=2, target_modules=["first"]))
            model.merge_adapter()
            weights = [layer.weight.clone() for _, layer in rosa_layers(model)]
            assert torch.get_float32_matmul_precision() == ("medium" if outside else "highest")
        torch.set_float32_matmul_precision(before)
        results.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_reference_forward_between_forward_and_backward():
    """The pattern of preference training: the model itself, disabled, is the reference."""
    base, x = Mlp(), torch.randn(4, 7).double()
    model = adapt(base)
    model(x).sum().backward()
    factor = layer_of(model, "first").rosa_A["default"]
    expected, factor.grad = factor.grad, None
    out = model(x)
    with model.disable_adapter(), torch.no_grad():
        model(x)
    out.sum().backward()
    torch.testing.assert_close(factor.grad, expected)


def test_another_adapters_forward_between_forward_and_backward():
    model, x = adapt(Mlp()), torch.randn(4, 7).double()
    model.add_adapter("reference", RosaConfig(r=1, target_modules=["first", "last"]))
    for _ in range(3):
        model(x).sum().backward()
        factor = layer_of(model, "first").rosa_A["default"]
        expected, factor.grad = factor.grad, None
        out = model(x)
        model.set_adapter("reference")
        with torch.no_grad():
            model(x)
        model.set_adapter("default")
        out.sum().backward()
        torch.testing.assert_close(factor.grad, expected)
        factor.grad = None
        resample(model)


def test_a_backward_pass_through_another_adapters_weight_is_refused():
    model, x = adapt(Mlp()), torch.randn(4, 7).double()
    model.add_adapter("other", RosaConfig(r=1, target_modules=["first", "last"]))
    out = model(x)
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"another adapter was made active.*inplace"):
        out.sum().backward()


def test_a_backward_pass_through_a_disabled_weight_is_refused():
    model, x = adapt(Mlp()), torch.randn(4, 7).double()
    out = model(x)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


def test_a_backward_pass_after_a_resample_is_refused():
    model, x = adapt(Mlp()), torch.randn(4, 7).double()
    out = model(x)
    resample(model)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


def test_a_disabled_graph_is_refused_after_a_resample():
    """The weight's count of changes is never one that another state of it has had."""
    for resamples in range(1, 4):
        model = adapt(Mlp())
        x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
        with model.disable_adapter():
            out = model(x)
        for _ in range(resamples):
            resample(model)
        with pytest.raises(RuntimeError, match="inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = adapt(Mlp())
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    factor = layer_of(model, "middle").rosa_B["default"]
    model(x).sum().backward()
    expected, factor.grad = factor.grad, None
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(factor.grad, expected)


def test_offsets_stay_in_main_memory_and_keep_their_precision():
    model = adapt(Mlp(torch.float32))
    terms = layer_of(model, "first").adapters["default"].terms
    model.half()
    assert layer_of(model, "first").adapters["default"].terms is terms
    assert not any("rosa_offset" in name for name, _ in model.named_buffers())
    assert any("rosa_offset" in name for name in model.state_dict())


def test_an_offset_does_not_grow_for_ever():
    model = adapt(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"])
    (_, layer), *_ = rosa_layers(model)
    for _ in range(12):
        with torch.no_grad():
            layer.rosa_B["default"].add_(torch.randn(5, 2))
        resample(model)
        assert layer.adapters["default"].terms.rank <= 1.5 * 5


def test_a_model_made_in_inference_mode_can_be_disabled():
    with torch.inference_mode():
        base, x = Mlp(), torch.randn(3, 7).double()
        expected = base(x)
        model = adapt(base)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_a_layer_compiles_without_a_break_and_sees_a_resample():
    model = adapt(Mlp(torch.float32))
    layer, x = layer_of(model, "middle"), torch.randn(4, 10)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    resample(model)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_layer_has_the_gradients_of_the_layer(autocast):
    layer = layer_of(adapt(Mlp(torch.float32)), "middle")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, weights = torch.randn(2, 4, 10), torch.randn(2, 4, 6)
    leaves = [x.requires_grad_(), layer.rosa_A["default"], layer.rosa_B["default"]]

    def gradients(layer):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = layer(x)
        return torch.autograd.grad((out * weights).sum(), leaves)

    for found, expected in zip(gradients(compiled), gradients(layer), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= (0.1 if autocast else 1e-5) * expected.norm()


def test_dropout_drops_of_the_factors_input_alone():
    layer = layer_of(adapt(Mlp(), rosa_dropout=0.5, alpha=3), "first").train()
    x = torch.randn(2, 4, 7).double().requires_grad_()
    factors = [layer.rosa_A["default"], layer.rosa_B["default"]]

    def plain(x):
        dropped = torch.nn.functional.dropout(x, 0.5)
        low_rank = dropped @ factors[0].T @ factors[1].T
        return layer.base_layer(x) + layer.adapters["default"].scaling * low_rank

    results = []
    for compute in (layer, plain):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            out = compute(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *factors])))
    torch.testing.assert_close(*results)
