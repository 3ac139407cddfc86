"""Traced, exported, compiled, or differentiated forward: the plain form, with the same outputs."""

from __future__ import annotations

import io

import pytest
import torch
from peft import get_peft_model
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from rosa import RosaConfig, resample
from tests.models import Mlp


@pytest.fixture
def model():
    config = RosaConfig(r=2, alpha=3, directions="svd", target_modules=["first", "middle", "last"])
    found = get_peft_model(Mlp(), config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    resample(found)
    return found


def plain(model):
    """The same model without ROSA."""
    return model.merge_and_unload()


def traced_and_saved(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    return torch.jit.load(file)


FORMS = {
    "trace": lambda model, x: torch.jit.trace(model, x),
    "saved trace": traced_and_saved,
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "compile": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_traced_or_exported_gives_the_same_outputs(model, make, training):
    x, other = torch.randn(2, 4, 7).double()
    model.train(training)
    made = make(model, x)
    torch.testing.assert_close(made(other), model(other))


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(model, dynamo, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x, path = model.float().eval(), torch.randn(4, 7), str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=dynamo)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x))


def test_forward_mode_agrees_with_the_plain_model(model):
    x, tangent = torch.randn(2, 4, 7).double()
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    direction = {name: torch.randn_like(factor) for name, factor in factors.items()}

    def loss(values, x):
        return functional_call(model, values, (x,)).square().sum()

    reverse = grad(loss)(factors, x)
    expected = sum((reverse[n] * direction[n]).sum() for n in factors)
    found = jvp(lambda values: loss(values, x), (factors,), (direction,))[1]
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(factors[n], direction[n]) for n in factors}
        found = forward_ad.unpack_dual(loss(dual, x)).tangent
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)
    each = vmap(lambda row: grad(lambda v: loss(v, row))(factors))(x)
    torch.testing.assert_close({n: g.sum(0) for n, g in each.items()}, reverse)
    curvature = hessian(lambda row: model(row).sum())(x[0])
    merged = plain(model)
    torch.testing.assert_close(out, jvp(merged, (x,), (tangent,))[1])
    torch.testing.assert_close(curvature, hessian(lambda row: merged(row).sum())(x[0]))
