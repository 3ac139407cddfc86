"""Convolutions: each is what torch's own is with the kernel W + s B A, in every setting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rosa import RosaConfig, export_lora, export_merged, resample, watch
from rosa.errors import ExportError
from rosa.kinds.conv import RosaConv
from rosa.layers.in_model import rosa_layers

CONVS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "bias": False}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "groups": 3}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "groups": 6}),  # depthwise
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "groups": 2}),
    (nn.Conv2d, {"kernel_size": 2, "padding": 1, "padding_mode": "replicate"}),
    (nn.Conv3d, {"kernel_size": 2, "stride": (1, 2, 1)}),
    (nn.Conv3d, {"kernel_size": (1, 3, 2), "padding": "same", "dilation": (1, 1, 2), "groups": 2}),
]
IN, OUT, RANK = 6, 12, 3


def dims(conv: nn.Module) -> int:
    return conv.weight.dim() - 2


def inputs_for(conv: nn.Module, batch: tuple[int, ...] = (4,)) -> Tensor:
    return torch.randn(*batch, IN, *(7, 8, 6)[: dims(conv)]).double()


@pytest.fixture(params=CONVS, ids=lambda each: f"{each[0].__name__}-{'-'.join(each[1])}")
def conv(request: pytest.FixtureRequest, _fresh_random_inputs: None) -> nn.Module:
    kind, settings = request.param
    return kind(IN, OUT, **settings).double()


def attach(conv: nn.Module, **options: Any) -> Any:
    options = {"r": RANK, "alpha": 2.0, "target_modules": ["0"], **options}
    return get_peft_model(nn.Sequential(conv), RosaConfig(**options))


def layer_of(model: nn.Module) -> RosaConv:
    ((_, layer),) = rosa_layers(model)
    assert isinstance(layer, RosaConv)
    return layer


def moved(model: nn.Module) -> None:
    """Give the factors other values, as a training does."""
    with torch.no_grad():
        for factor in layer_of(model).adapters["default"].factors:
            factor.add_(0.2 * torch.randn_like(factor))


def with_kernel(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """Torch's own convolution with the kernel of W in memory plus s B A, and leaves A and B."""
    layer = layer_of(model)
    a, b = (
        factor.detach().double().requires_grad_() for factor in layer.adapters["default"].factors
    )
    plain = copy.deepcopy(layer.get_base_layer())
    kernel = plain.weight.detach() + (2.0 / a.shape[0] * b @ a).reshape(plain.weight.shape)
    del plain.weight
    plain.weight = kernel  # type: ignore[assignment]
    return plain, a, b


@pytest.mark.parametrize("batch", [(4,), ()])
def test_outputs_and_gradients_are_those_of_the_changed_kernel(conv, batch):
    x = inputs_for(conv, batch)
    model = attach(conv, directions="svd")
    model.double()
    moved(model)
    plain, *expected_leaves = with_kernel(model)
    leaves = layer_of(model).adapters["default"].factors
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = model(one), plain(other)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), [one, *leaves]),
        torch.autograd.grad((expected * weights).sum(), [other, *expected_leaves]),
    )


def test_it_starts_as_it_was_and_draws_keep_the_outputs(conv):
    x = inputs_for(conv)
    before, pretrained = conv(x), conv.weight.detach().clone()
    model = attach(conv)
    torch.testing.assert_close(model(x), before)
    for _ in range(3):
        moved(model)
        learned = model(x)
        resample(model)
        torch.testing.assert_close(model(x), learned)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), before)
    delta = layer_of(model).get_delta_weight("default")
    assert delta.shape == pretrained.shape
    model.merge_adapter()
    torch.testing.assert_close(model(x), learned)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), learned)
    merged = copy.deepcopy(model).merge_and_unload()[0]
    assert type(merged) is type(conv)
    torch.testing.assert_close(merged(x), learned)
    torch.testing.assert_close(merged.weight, pretrained + delta.double())
    torch.testing.assert_close(model.unload()[0].weight, pretrained)


@pytest.mark.parametrize("reads", [False, True])
def test_what_is_watched_is_the_gradient_of_the_kernel(conv, reads):
    """Of two watched passes together, whether the layer is called or its weight is read."""
    xs = [inputs_for(conv), inputs_for(conv)]
    model = attach(conv)
    layer = layer_of(model)
    targets = [torch.randn_like(conv(x)) for x in xs]
    total = torch.zeros_like(conv.weight)
    watch(model)
    for x, target in zip(xs, targets, strict=True):
        plain, *_ = with_kernel(model)
        plain.weight.detach_().requires_grad_()
        total += torch.autograd.grad((plain(x) * target).sum(), plain.weight)[0]
        if reads:
            (conv._conv_forward(x, layer.weight, conv.bias) * target).sum().backward()
        else:
            (model(x) * target).sum().backward()
    sketch = layer.adapters["default"].sketch
    assert sketch is not None
    torch.testing.assert_close(sketch.total, (total.flatten(1) @ sketch.test).T)
    resample(model)  # and the draw is of what was watched
    u, b = sketch.directions(RANK, sketch.total), layer.rosa_B["default"].double()
    torch.testing.assert_close(u @ (u.T @ b), b, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(conv, tmp_path):
    x, fresh = inputs_for(conv), nn.Sequential(copy.deepcopy(conv))
    model = attach(conv)
    moved(model)
    resample(model)
    moved(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x))
    model.add_adapter("other", RosaConfig(r=2, target_modules=["0"]))
    expected = model(x)
    for name in ("other", "default", "other", "default"):
        model.set_adapter(name)
    torch.testing.assert_close(model(x), expected)


def test_exports_are_exact_or_refused(conv, tmp_path):
    x, fresh = inputs_for(conv), nn.Sequential(copy.deepcopy(conv))
    model = attach(conv)
    moved(model)
    resample(model)
    moved(model)
    expected = model(x)
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    if not plain:
        with pytest.raises(ExportError, match=r"LoRA('s product| knows no).*\(layer 0\)"):
            export_lora(model, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
    else:
        export_lora(model, tmp_path / "lora")
        lora = PeftModel.from_pretrained(fresh, str(tmp_path / "lora")).double()
        assert lora.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(lora(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["both", "A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(conv, trained, dtype):
    x = inputs_for(conv).to(dtype)
    teacher = copy.deepcopy(conv)
    nn.init.normal_(teacher.weight, std=0.5)
    target = teacher(x.double()).detach().to(dtype)
    model = attach(conv.to(dtype), trained=trained, rosa_dropout=0.1 if trained == "both" else 0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(30):
        if step == 15:
            before = model.eval()(x)
            resample(model.train(), optimizer)
            close = 1e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(model.eval()(x), before, rtol=close, atol=close)
            model.train()
        loss = (model(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[15:]) < min(losses[:15]) < 0.98 * losses[0]


def test_under_autocast(conv):
    x = inputs_for(conv).float()
    model = attach(conv.float())
    moved(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    torch.testing.assert_close(found.float(), model(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_inputs_may_be_channels_last_and_the_kernel_gets_torchs_own_order(dtype):
    conv = nn.Conv2d(IN, OUT, 3)
    x = torch.randn(2, IN, 5, 5).to(memory_format=torch.channels_last)
    for given in (conv, copy.deepcopy(conv).to(memory_format=torch.channels_last)):
        pretrained, before = given.weight.detach().clone(), given(x)
        model = attach(given)
        assert model(x).is_contiguous(memory_format=torch.channels_last)
        moved(model)
        resample(model)
        expected = model(x)
        model.to(dtype=dtype, memory_format=torch.channels_last)
        close = {"rtol": 0, "atol": 64 * max(torch.finfo(dtype).eps, 2**-23)}
        torch.testing.assert_close(model(x.to(dtype)).float(), expected, **close)
        resample(model)
        torch.testing.assert_close(model(x.to(dtype)).float(), expected, **close)
        with model.disable_adapter():
            torch.testing.assert_close(model(x.to(dtype)).float(), before, **close)
        found = model.unload()[0].weight
        once = max(torch.finfo(dtype).eps, 2**-22)
        torch.testing.assert_close(found.float(), pretrained, rtol=0, atol=once)


class OfBoundedNorm(nn.Conv2d):
    """As EEGNet's, which gives its weight other values in each call."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(x)


def test_a_forward_that_writes_its_weight_writes_the_changed_one():
    conv = OfBoundedNorm(IN, OUT, 3).double()
    x, plain = inputs_for(conv), copy.deepcopy(conv)
    model = attach(conv).double()
    torch.testing.assert_close(model(x), plain(x))
    moved(model)
    changed, *_ = with_kernel(model)
    torch.testing.assert_close(model(x), changed(x))


def test_models_can_ask_for_what_they_ask_of_a_convolution(conv):
    """As Whisper asks for the stride, to tell how long its outputs are."""
    layer = layer_of(attach(conv))
    for name in ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels"):
        assert getattr(layer, name) == getattr(conv, name)
    assert not hasattr(layer, "strides")


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1)))


@pytest.mark.parametrize("kind", [Standardized, Padded])
def test_a_subclass_computes_with_the_changed_kernel(kind, tmp_path):
    conv = kind(IN, OUT, 3, groups=2).double()
    x, fresh = inputs_for(conv), nn.Sequential(copy.deepcopy(conv))
    before = conv(x)
    model = attach(conv).double()
    torch.testing.assert_close(model(x), before)
    moved(model)
    plain, *expected_leaves = with_kernel(model)
    leaves = layer_of(model).adapters["default"].factors
    watch(model)
    found, expected = model(x), plain(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), expected_leaves),
    )
    sketch = layer_of(model).adapters["default"].sketch
    assert sketch is not None
    assert not sketch.is_empty()
    resample(model)
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(str(tmp_path / "own"))
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, str(tmp_path / "own"))(x), expected)
    with pytest.raises(ExportError, match="cannot be exported to LoRA"):
        export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
    with pytest.raises(ValueError, match="leave rosa_dropout at 0"):
        attach(kind(IN, OUT, 3), rosa_dropout=0.1)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ConvTranspose2d(IN, OUT, 3), "is a ConvTranspose2d, which is not supported"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(IN, OUT, 3)), "computed from others"),
    ],
)
def test_what_is_no_convolution_of_its_weight_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        attach(module)


def test_a_rank_beyond_a_groups_is_capped_with_a_warning():
    with pytest.warns(UserWarning, match=r"larger than the smaller side.*: 0 \(32 to 6\)"):
        model = attach(nn.Conv2d(IN, IN, 3, groups=IN), r=32)
    assert layer_of(model).rosa_A["default"].shape == (6, 9)


def test_a_merged_export_is_a_plain_model(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=2
    )
    model = get_peft_model(
        ResNetForImageClassification(config), RosaConfig(r=4, target_modules=["convolution"])
    ).eval()
    for _, layer in rosa_layers(model):
        with torch.no_grad():
            layer.rosa_B["default"].add_(0.1)
    resample(model)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x).logits
    export_merged(model, tmp_path / "merged")
    loaded = ResNetForImageClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(x).logits, expected, rtol=1e-4, atol=1e-4)
