"""Models that use their layers in other ways than to call them, and layers of unusual making."""

from __future__ import annotations

import copy
import types
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from rosa import RosaConfig, export_lora, export_merged, export_rosa, resample, watch
from rosa.errors import ExportError, UserError
from rosa.layers.in_model import rosa_layers
from tests.helpers import moved
from tests.models import tiny_gpt2


def attach(base: nn.Module, targets: Any = None, **options: Any) -> Any:
    named = {} if targets is None else {"target_modules": targets}
    config = RosaConfig(**{"r": 2, "alpha": 3.0, **named, **options})
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def plain_of(model: Any, base: nn.Module) -> Any:
    """A plain model whose weights are what the adapted one's are said to be."""
    plain: Any = copy.deepcopy(base)
    with torch.no_grad():
        for name, layer in rosa_layers(model.base_model.model):
            path = f"{name}.{layer.weight_path}".replace(".base_layer", "")
            weight = plain.get_parameter(path)
            weight.add_(layer.get_delta_weight("default").to(weight.dtype))
    return plain


def trained(base: nn.Module, targets: Any = None, **options: Any) -> Any:
    """With what is to be learned learned in part, over a draw."""
    model = attach(base, targets, **options)
    moved(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random directions do
        resample(model)
    moved(model)
    return model


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


# -- methods -----------------------------------------------------------------------------------


class Projecting(nn.Linear):
    scale = 2.0

    def project(self, x: Tensor, bias: bool = True) -> Tensor:
        return self.scale * F.linear(x, self.weight, self.bias if bias else None)

    def twice(self, x: Tensor) -> Tensor:
        return self.project(self(x)[..., : self.in_features])

    @classmethod
    def kind(cls) -> type:
        return cls


class Attending(nn.Embedding):
    def attend(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Kernel(nn.Conv1d):
    def spread(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(x, self.weight)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5) / 2)
        self.down = nn.Parameter(torch.randn(3, 5, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down @ torch.tanh(self.up @ x)

    def backwards(self, x: Tensor) -> Tensor:
        return self.up.mT @ torch.tanh(self.down.mT @ x)


class Calling(nn.Module):
    """Calls methods of its layers, and the layers too if it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Projecting(6, 7)
        self.embedding = Attending(9, 7)
        self.kernel = Kernel(9, 3, 2)
        self.experts = Experts()
        self.both = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear.project(torch.ones(len(ids), 6).double() * ids[:, None] / 9)
        x = x + self.linear.project(x[:, 1:], bias=False) + self.linear.twice(x[:, 1:])
        x = self.embedding.attend(torch.tanh(x))
        x = self.kernel.spread(torch.tanh(x[:, :3, None]))
        x = self.experts.backwards(x.flatten(1)[:3, :5, None])
        if self.both:
            x = (
                x.sum()
                + self.embedding(ids[:3])
                + self.linear(torch.tanh(x[:, :1, 0].repeat(1, 6)))
            )
        return x


CALLED = {
    "target_modules": ["linear", "embedding", "kernel"],
    "target_parameters": ["experts.up", "experts.down"],
}


@pytest.fixture
def calling(_fresh_random_inputs: None) -> Calling:
    model = Calling().double()
    nn.init.normal_(model.linear.bias)
    return model


@pytest.mark.parametrize("both", [False, True], ids=["methods", "methods-and-calls"])
@pytest.mark.parametrize("options", [{}, {"trained": "B"}, {"directions": "zero"}])
def test_a_method_of_an_adapted_module_computes_with_the_changed_weight(calling, both, options):
    calling.both = both
    base, ids = copy.deepcopy(calling), torch.randint(9, (4,))
    model = trained(calling, **CALLED, **options)
    plain = plain_of(model, base)
    close(model(ids), plain(ids))
    with model.disable_adapter():
        close(model(ids), base(ids))
    model.merge_adapter()
    close(model(ids), plain(ids))
    model.unmerge_adapter()
    close(model(ids), plain(ids))
    close(model.merge_and_unload()(ids), plain(ids))


def test_gradients_of_a_method_reach_the_factors_and_what_watches(calling):
    base = copy.deepcopy(calling)
    model = trained(calling, **CALLED)
    plain = plain_of(model, base)
    ids = torch.randint(9, (4,))
    watch(model)
    for each in (model, plain):
        each(ids).square().sum().backward()
    for name, layer in rosa_layers(model.base_model.model):
        path = f"{name}.{layer.weight_path}".replace(".base_layer", "")
        grad = layer.base_weight.view.as_matrix(plain.get_parameter(path).grad)
        if grad.shape != layer.base_weight.shape:
            grad = grad.flatten(1)
        adapter = layer.adapters["default"]
        a, b = adapter.factors
        close(a.grad, adapter.scaling * b.mT @ grad)
        close(b.grad, adapter.scaling * grad @ a.mT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the gradient of every weight was seen
        resample(model)
    close(model(ids), plain(ids))


def test_what_is_no_method_is_handed_out_as_it_is(calling):
    model = attach(calling, **CALLED)
    linear = model.base_model.model.linear
    assert linear.kind() is Projecting
    assert linear.scale == 2.0
    assert linear.in_features == 6
    assert model.base_model.model.embedding.num_embeddings == 9
    with pytest.raises(AttributeError, match="nothing"):
        linear.nothing()


def test_a_method_that_writes_the_weight_is_refused_while_the_adapter_is_in_use(calling):
    model = trained(calling, ["linear"])
    linear, x = model.base_model.model.linear, torch.randn(3, 6).double()
    before = linear(x)
    with pytest.raises(UserError, match="read but not written"):
        linear.reset_parameters()
    assert torch.equal(linear(x), before)
    with model.disable_adapter():
        was = linear.base_layer.weight.clone()
        linear.reset_parameters()
        assert not torch.equal(was, linear.base_layer.weight)


# -- patched -----------------------------------------------------------------------------------


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 4)
        self.kernel = nn.Conv1d(4, 3, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embedding(ids))
        return self.kernel(self.attention(x, x, x)[0].mT)


def doubled(self: nn.Module, *args: Any) -> Any:
    """Three times what the module's class computes of it, less a part of its weight."""
    found = type(self).forward(self, *args)
    if isinstance(found, tuple):
        return (3 * found[0] - self.in_proj_weight.mean(), None)
    return 3 * found - self.weight.mean()


THREE = ["embedding", "linear", "kernel", "attention"]


@pytest.mark.parametrize("which", THREE)
@pytest.mark.parametrize("when", ["base", "before", "around"])
def test_a_forward_of_the_modules_own_computes_with_the_changed_weight(which, when):
    base, ids = Three().double(), torch.randint(9, (2, 5))
    patched = copy.deepcopy(base)

    def patch(module: Any) -> None:
        module.forward = types.MethodType(doubled, module)

    if when == "before":
        patch(getattr(base, which))
    if (which, when) == ("linear", "before"):
        with pytest.raises(UserError, match="linear"):
            attach(base, THREE)
        return
    model = trained(base, THREE)
    layer = getattr(model.base_model.model, which)
    if when == "base":
        patch(layer.base_layer)
    elif when == "around":
        inner = layer.forward
        layer.forward = lambda *args: around(layer, inner(*args))
    plain = plain_of(model, patched)
    if when == "around":
        inner_plain = getattr(plain, which).forward
        one = getattr(plain, which)
        one.forward = lambda *args: around(one, inner_plain(*args))
    else:
        patch(getattr(plain, which))
    close(model(ids), plain(ids))
    model(ids).sum().backward()
    plain(ids).sum().backward()
    weight = getattr(plain, which)
    name = "in_proj_weight" if which == "attention" else "weight"
    grad = layer.base_weight.view.as_matrix(getattr(weight, name).grad)
    adapter = layer.adapters["default"]
    close(adapter.factors[1].grad, adapter.scaling * grad @ adapter.factors[0].mT)


def around(module: Any, found: Any) -> Any:
    weight = module.in_proj_weight if isinstance(found, tuple) else module.weight
    if isinstance(found, tuple):
        return (found[0] * weight.mean(), None)
    return found * weight.mean()


@pytest.mark.parametrize("which", ["embedding", "linear"])
def test_dropout_is_refused_where_the_module_has_a_forward_of_its_own(which):
    model = attach(Three().double(), ["embedding", "linear"], rosa_dropout=0.1)
    base = getattr(model.base_model.model, which).base_layer
    base.forward = types.MethodType(doubled, base)
    with pytest.raises(UserError, match="rosa_dropout"):
        model(torch.randint(9, (2, 5)))


# -- compiled ----------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Experts, of which the layers around it are called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.experts(x))


COMPILED: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "methods": (Calling, CALLED, lambda: torch.randint(9, (4,))),
    "attention": (Three, {"target_modules": THREE}, lambda: torch.randint(9, (2, 5))),
    "parameters": (
        Mixed,
        {"target_modules": ["last"], "target_parameters": ["up", "down"]},
        lambda: torch.randn(3, 5, 4).double(),
    ),
}


@pytest.mark.parametrize("which", COMPILED)
def test_it_is_compiled_as_one_graph(which):
    make, options, draw = COMPILED[which]
    model, x = trained(make().double(), **options), draw()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = []
        for each in (model, compiled):
            model.zero_grad()
            out = each(x)
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        for one, other in zip(*found, strict=True):
            close(one, other)
        moved(model)


# -- checkpoints inside ------------------------------------------------------------------------


class Recomputing(nn.Module):
    """Uses weights of its own in parts that a checkpoint computes anew in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 6))
        self.down = nn.Parameter(torch.randn(6, 6))
        self.beside = nn.Linear(6, 6)
        self.how: bool | None = None  # reentrant or not; None computes nothing anew

    def anew(self, part: Any, x: Tensor) -> Tensor:
        if self.how is None:
            return part(x)
        return checkpoint(part, x, use_reentrant=self.how)

    def first(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.T) + self.beside(x) @ self.down

    def second(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.up) * (x @ self.down.T)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.anew(self.second, self.anew(self.first, x) @ self.up)
        return x, {"more": self.anew(self.first, x)}


class RecomputingLinear(nn.Linear):
    """Its `spread` is called, and computes anew."""

    how: bool | None = None

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) @ self.weight.T

    def spread(self, x: Tensor) -> Tensor:
        if self.how is None:
            return self.part(x)
        return checkpoint(self.part, x, use_reentrant=self.how) + 0 * self.weight.mean()


class OfRecomputing(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.before, self.after = nn.Linear(6, 6), RecomputingLinear(6, 6)
        self.inside = Recomputing()

    def forward(self, x: Tensor) -> Tensor:
        x, more = self.inside(self.before(x))
        if self.twice:
            x = self.inside(x + more["more"])[0]
        return self.after.spread(x) + self.after(more["more"])


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_module_computes_anew_in_the_backward_pass_has_the_changed_weight(
    reentrant, twice, outside
):
    parameters = ["inside.up", "inside.down"]
    base = OfRecomputing(twice).double()
    model = trained(base, ["before", "after"], target_parameters=parameters)
    x, found = torch.randn(3, 6).double(), []
    for how in (None, reentrant, reentrant):
        model.base_model.model.after.how = model.base_model.model.inside.how = how
        model.zero_grad()
        given = x.clone().requires_grad_()
        if outside and how is not None:
            checkpoint(model, given, use_reentrant=reentrant).square().sum().backward()
        else:
            model(given).square().sum().backward()
        found.append([given.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        for _, layer in rosa_layers(model):  # nothing is left of the pass
            assert layer.parameter_name not in vars(layer.get_base_layer())
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            close(one, two)


# -- attributes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "name", "value"),
    [
        ("kernel", "stride", (2,)),
        ("kernel", "padding", (1,)),
        ("embedding", "padding_idx", 3),
        ("attention", "batch_first", False),
        ("attention", "in_proj_bias", None),
        ("linear", "bias", nn.Parameter(torch.arange(4).double())),
        ("linear", "bias", None),
        ("kernel", "bias", nn.Parameter(torch.arange(3).double())),
    ],
)
def test_an_attribute_of_the_module_is_set_in_the_module(which, name, value):
    base, ids = Three().double(), torch.randint(9, (2, 5))
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    plain = copy.deepcopy(base)
    model = trained(base, THREE)
    for each in (model.base_model.model, plain):
        setattr(getattr(each, which), name, value)
    layer = getattr(model.base_model.model, which)
    assert getattr(layer.base_layer, name) is value
    assert getattr(layer, name) is value
    close(model(ids), plain_of(model, plain)(ids))
    assert getattr(copy.deepcopy(layer).base_layer, name) is not None or value is None


def test_what_the_module_does_not_have_stays_with_the_layer():
    model = attach(Three().double(), THREE)
    layer = model.base_model.model.linear
    layer.note = "mine"
    assert not hasattr(layer.base_layer, "note")
    layer._note, layer.base_layer._note = "mine", "its"
    assert layer.base_layer._note == "its"


def test_what_the_module_made_later_is_set_in_the_module():
    model = attach(Three().double(), THREE)
    layer = model.base_model.model.linear
    layer.base_layer.seen = "once"  # as a state of its first pass
    layer.seen = None
    assert layer.base_layer.seen is None


@pytest.mark.parametrize("name", ["ds_id", "ds_grads_remaining", "pre_bwd_fn", "_hf_hook"])
def test_what_an_engine_notes_is_of_each_module_alone(name):
    model = attach(Three().double(), THREE)
    layer = model.base_model.model.linear
    setattr(layer.base_layer, name, 1)  # modules inside first, as DeepSpeed does
    setattr(layer, name, 2)
    assert (getattr(layer.base_layer, name), getattr(layer, name)) == (1, 2)


def test_an_adapted_weight_is_not_replaced_in_front_of_its_module():
    model = attach(Three().double(), THREE)
    for value in (nn.Parameter(torch.zeros(2, 2)), torch.zeros(2, 2)):
        with pytest.raises(UserError, match="weight is adapted"):
            model.base_model.model.linear.weight = value


def test_an_adapted_parameter_is_not_replaced_in_front_of_its_module():
    model = attach(Mixed().double(), target_parameters=["experts.up"])
    experts = model.base_model.model.experts
    for value in (nn.Parameter(torch.randn(3, 6, 5)), torch.randn(3, 6, 5)):
        with pytest.raises(UserError, match="up"):
            experts.up = value
    experts.down = nn.Parameter(torch.zeros(3, 5, 6).double())
    assert not model(torch.randn(3, 5, 4).double())[..., 0].diff().any()


# -- memory ------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two linear layers, of which the second is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def is_left_alone(base: nn.Module, options: dict[str, Any], *names: str) -> None:
    """Attaching is refused with these names, before anything of the model has changed."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(UserError) as error:
        attach(base, **options)
    assert all(name in str(error.value) for name in names), error.value
    assert kinds == [type(module) for module in base.modules()]
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor.to_dense(), before[name].to_dense())


VIEWS = {
    "whole": lambda w: w.detach(),
    "transposed": lambda w: w.detach().T,
    "flat": lambda w: w.detach().view(-1),
    "row": lambda w: w.detach()[2],
    "column": lambda w: w.detach()[:, 1],
    "diagonal": lambda w: w.detach().diagonal(),
    "bytes": lambda w: w.detach().view(torch.uint8),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("where", ["one", "two", ""])
@pytest.mark.parametrize(
    "options", [{"targets": ["one"]}, {"target_parameters": ["one.weight"]}], ids=str
)
def test_a_weight_whose_memory_a_buffer_shares_is_refused(view, where, options):
    base = Two().double()
    base.get_submodule(where).register_buffer("alias", VIEWS[view](base.one.weight))
    is_left_alone(base, options, "one", f"{where}.alias".strip("."), "buffer")
    model = trained(base, ["two"])
    assert model(torch.randn(2, 6).double()).shape == (2, 6)


def test_a_weight_in_a_part_of_a_buffer_is_refused():
    base, flat = Two().double(), torch.randn(100).double()
    base.register_buffer("flat", flat)
    base.one.weight = nn.Parameter(flat[20:50].view(5, 6))
    is_left_alone(base, {"targets": ["one"]}, "one", "flat")


def test_weights_that_only_lie_beside_each_other_are_adapted():
    base, flat = Two().double(), torch.randn(60).double()
    base.one.weight = nn.Parameter(flat[:30].view(5, 6))
    base.two.weight = nn.Parameter(flat[30:].view(6, 5))
    block = torch.randn(8, 14).double()
    base.three, base.four = nn.Linear(6, 5), nn.Linear(5, 8)
    base.three.weight = nn.Parameter(block[:5, :6])
    base.four.weight = nn.Parameter(block[:, 6:11])
    base.register_buffer("beside", block[:, 11:])
    before = copy.deepcopy(base.state_dict())
    model = attach(base, ["one", "two", "three", "four"])
    moved(model)
    assert torch.equal(base.beside, before["beside"])
    plain = model.unload().state_dict()
    for name, tensor in before.items():
        close(plain[name], tensor)


class Graph(nn.Module):
    """Sums over neighbours, by a sparse matrix, between linear layers."""

    def __init__(self, layout: str = "to_sparse") -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 6)
        self.register_buffer("near", getattr(torch.eye(4).double().round(), layout)())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.near @ self.one(x)))


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_model_with_sparse_buffers_is_adapted_saved_and_exported(tmp_path, layout):
    base, x = Graph(layout).double(), torch.randn(4, 6).double()
    state = {name: tensor for name, tensor in base.state_dict().items() if name != "near"}
    plain = Graph().double()  # torch copies no other layout
    plain.load_state_dict(copy.deepcopy(state), strict=False)
    model = trained(base, ["one", "two"])
    expected = plain_of(model, plain)(x)
    close(model(x), expected)
    model.save_pretrained(tmp_path / "adapter")
    close(PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter"))(x), expected)
    export_lora(model, tmp_path / "lora")
    export_merged(model, tmp_path / "merged")
    merged = Graph(layout).double()
    merged.load_state_dict(torch.load(tmp_path / "merged" / "pytorch_model.bin"))
    close(merged(x), expected)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("options", [{"targets": ["one"]}, {"target_parameters": ["one.weight"]}])
def test_a_sparse_weight_is_refused(layout, options):
    base = Two().double()
    base.one.weight = nn.Parameter(getattr(base.one.weight.detach(), layout)())
    is_left_alone(base, options, "one", "sparse")
    trained(base, ["two"])


@pytest.mark.parametrize(
    "options", [{"targets": ["embedding"]}, {"target_parameters": ["embedding.weight"]}], ids=str
)
def test_an_embedding_with_sparse_gradients_learns_as_one_without(options):
    base = Three().double()
    other = copy.deepcopy(base)
    base.embedding.sparse = True
    models, ids = [attach(each, **options) for each in (base, other)], torch.randint(9, (2, 5))
    for model in models:
        watch(model)
        model(ids).square().sum().backward()
        resample(model)
        model(ids).square().sum().backward()
    layers = [next(iter(rosa_layers(model)))[1] for model in models]
    for one, two in zip(*(layer.adapters["default"].factors for layer in layers), strict=True):
        close(one, two)
        close(one.grad, two.grad)


# -- exports -----------------------------------------------------------------------------------


class Remark:
    """A state of a class that torch does not know."""

    def __init__(self, note: str) -> None:
        self.note = note


class Extra(nn.Linear):
    """Keeps more in a state dict than weights."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


STATES = [
    {"steps": [1, torch.ones(2)], "note": "x"},
    "a note",
    torch.arange(3),
    Remark("x"),
    None,
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: type(state).__name__)
@pytest.mark.parametrize("targets", [["one"], ["two"], ["one", "two"]])
def test_a_model_with_an_extra_state_is_exported(tmp_path, state, targets):
    def make() -> Two:
        base = Two()
        base.one = Extra(6, 5)
        base.one.extra = state
        return base.double()

    base = make()
    plain, x = copy.deepcopy(base), torch.randn(3, 6).double()
    model = trained(base, targets)
    for export in (export_lora, export_rosa, export_merged):
        export(model, tmp_path / export.__name__)
    found = torch.load(tmp_path / "export_merged" / "pytorch_model.bin", weights_only=False)
    merged = make()
    merged.load_state_dict(found)
    close(merged(x), plain_of(model, plain)(x))
    assert type(merged.one.extra) is type(state)


def test_what_transformers_cannot_save_is_said_before_anything_is_written(tmp_path):
    extra, shared = tiny_gpt2(), tiny_gpt2()
    extra.transformer.h[0].attn.more = Extra(2, 2)
    extra.transformer.h[0].attn.more.extra = {"steps": 3}
    shared.transformer.h[0].attn.more = nn.Linear(16, 48)
    shared.transformer.h[0].attn.more.bias = shared.transformer.h[0].attn.c_attn.bias
    for base, what in ((extra, "more._extra_state"), (shared, "shared tensors")):
        model = trained(base, ["c_fc"])
        with pytest.raises(UserError, match=what):
            export_merged(model, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


class Tied(GPT2LMHeadModel):
    """Saves a weight and a bias under one of their two names."""

    _tied_weights_keys = {  # noqa: RUF012  # transformers' own
        "lm_head.weight": "transformer.wte.weight",
        "second.weight": "transformer.h.0.attn.c_attn.weight",
        "other.bias": "transformer.h.0.attn.c_attn.bias",
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.other, self.second = nn.Linear(16, 48), nn.Linear(48, 16)
        self.post_init()
        self.tie_weights()

    def post_init(self) -> None:
        if hasattr(self, "second"):  # else it is torch's before all are there
            super().post_init()


@pytest.mark.parametrize("targets", [["c_fc"], ["h.1.attn.c_attn"]])
def test_a_model_with_second_names_is_merged(tmp_path, targets):
    base = Tied(tiny_gpt2().config).eval()
    assert base.second.weight is base.transformer.h[0].attn.c_attn.weight
    is_left_alone(base, {"targets": ["c_attn"]}, "second")
    model = trained(base, targets)
    ids = torch.randint(50, (2, 5))
    export_merged(model, tmp_path)
    merged = Tied.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(ids).logits, model(ids).logits)


# -- huge changes ------------------------------------------------------------------------------


def ulps(found: Tensor, expected: Tensor) -> float:
    """How far off a weight is, in roundings of its norm."""
    size = float(expected.norm()) * torch.finfo(expected.dtype).eps
    return float((found - expected).norm()) / max(size, torch.finfo(expected.dtype).tiny)


@pytest.mark.parametrize("power", range(-1, 9))
@pytest.mark.parametrize("options", [{}, {"directions": "svd"}, {"trained": "B"}])
def test_a_change_far_larger_than_the_weight_is_taken_out_again(power, options):
    base = Three()
    before = copy.deepcopy(base.state_dict())
    model = attach(base, THREE, **options)
    for draw in range(4):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _, layer in rosa_layers(model):
                adapter = layer.adapters["default"]
                for factor in adapter.factors:
                    if factor.requires_grad:
                        factor.add_(torch.randn_like(factor) * (1 if draw else 10**power))
            resample(model)
        with model.disable_adapter():
            state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
            found = {k: state[f"base_model.model.{k}"].clone() for k in before}
        for name, weight in before.items():
            assert ulps(found[name], weight) < 32, name
        for _ in range(3):
            with model.disable_adapter():
                for _, layer in rosa_layers(model):
                    name = f"{layer.name}.{layer.parameter_name}"
                    weight = layer.base_weight.parameter
                    if power > 3:  # then a copy is kept, from which it comes back exactly
                        assert torch.equal(weight, found[name])
                    assert ulps(weight, before[name]) < 32, name
    for name, weight in model.unload().state_dict().items():
        assert ulps(weight, before[name]) < 32, name


def test_no_copy_is_kept_of_a_weight_that_is_changed_by_as_much_as_it_is():
    model = attach(Two(), ["one", "two"])
    for _ in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moved(model, 0.05)
            resample(model)
        assert all(layer.base_weight.kept is None for _, layer in rosa_layers(model))


# -- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("options", [{"targets": ["two"]}, {"target_parameters": ["two.weight"]}])
def test_an_embedding_that_changes_its_own_weight_is_refused(kind, options):
    base = Two().double()
    base.two = kind(9, 5, max_norm=0.5).double()
    is_left_alone(base, options, "two")
    if "target_parameters" in options:
        base.two.max_norm = None
        attach(base, **options)


# -- never run ---------------------------------------------------------------------------------


def _reads(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x))


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=50, num_attention_heads=2, **sizes)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_reads_weights_is_not_exported_to_lora_unseen(tmp_path, training, monkeypatch):
    model = trained(tiny_llama(), ["gate_proj", "up_proj"])
    model.save_pretrained(tmp_path / "adapter")
    fresh: Any = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")).train(training)
    modes = [module.training for module in fresh.modules()]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_lora(fresh, tmp_path / "calls")
    assert [module.training for module in fresh.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(LlamaMLP, "forward", _reads)
    reading = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    with pytest.raises(ExportError, match=r"reads the weight of .*gate_proj"):
        export_lora(reading, tmp_path / "reads")


@pytest.mark.parametrize("why", ["no inputs", "others", "disabled"])
def test_a_model_that_cannot_be_run_is_exported_with_a_warning(tmp_path, why, monkeypatch):
    model: Any = attach(Two() if why == "no inputs" else tiny_llama(), "all-linear")
    moved(model)
    if why == "others":
        other = property(lambda self: {"pixel_values": torch.zeros(1, 3, 4, 4)})
        monkeypatch.setattr(LlamaForCausalLM, "dummy_inputs", other)
    elif why == "disabled":
        model.base_model.disable_adapter_layers()
    with pytest.warns(UserWarning, match="has not run yet"):
        export_lora(model, tmp_path)


class Holding(nn.Module):
    """Calls a module by a reference that torch does not know of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        if how == "attribute":
            self.__dict__["held"] = self.one
        else:
            lists = {"list": [self.one], "dict": {"a": self.one}, "nested": [(1, {"b": self.one})]}
            self.held: Any = lists[how]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize("how", ["attribute", "list", "dict", "nested"])
def test_a_module_that_is_held_unregistered_is_refused(how):
    base, x = Holding(how), torch.randn(3, 5)
    before = base(x)
    with pytest.raises(UserError, match=r"one is held by held too.*exclude_modules=\['one'\]"):
        attach(base, ["one", "two"])
    assert torch.equal(base(x), before)
    assert not list(rosa_layers(base))
    model = attach(base, ["two"])
    torch.testing.assert_close(model(x), before)


def test_all_linear_leaves_out_what_is_held_so():
    with pytest.warns(UserWarning, match="all-linear leaves out one: .*held in a list"):
        model = attach(Holding("list"), "all-linear")
    assert [name for name, _ in rosa_layers(model.base_model.model)] == ["two"]
