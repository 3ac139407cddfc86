from __future__ import annotations

import pytest
import torch

from rosa.algebra import triplets
from rosa.algebra.triplets import singular_triplets


def residuals(weight, left, sizes, right):
    """Of both equations of a singular triplet, over the largest singular value, in float64."""
    weight, left, sizes, right = (t.double() for t in (weight, left, sizes, right))
    largest = torch.linalg.matrix_norm(weight, 2)
    forward = torch.linalg.vector_norm(weight @ right.T - left * sizes, dim=0)
    backward = torch.linalg.vector_norm(weight.T @ left - right.T * sizes, dim=0)
    return max(forward.max(), backward.max()) / largest


def check(weight, chosen, tolerance=1e-4):
    left, sizes, right = singular_triplets(weight, chosen)
    rank = len(chosen)
    assert left.shape == (weight.shape[0], rank)
    assert right.shape == (rank, weight.shape[1])
    assert residuals(weight, left, sizes, right) <= tolerance
    expected = torch.linalg.svdvals(weight.double())[chosen]
    torch.testing.assert_close(sizes.double(), expected, rtol=0, atol=1e-5 * float(expected.max()))
    identity = torch.eye(rank).double()
    torch.testing.assert_close(left.double().T @ left.double(), identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(right.double() @ right.double().T, identity, rtol=0, atol=1e-5)


def with_spectrum(sizes, out_features=60, in_features=60):
    u = torch.linalg.qr(torch.randn(out_features, len(sizes)).double()).Q
    v = torch.linalg.qr(torch.randn(in_features, len(sizes)).double()).Q
    return ((u * sizes.double()) @ v.T).float()


@pytest.fixture
def no_full_svd(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the full SVD was taken")

    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    yield
    monkeypatch.setattr(torch.linalg, "svd", svd)


@pytest.mark.parametrize("shape", [(60, 60), (50, 200), (200, 50)])
def test_triplets_of_a_float32_weight_without_a_full_svd(shape, no_full_svd):
    check(torch.randn(shape), torch.tensor([0, 7, 23, 49]))


@pytest.mark.parametrize("order", [[3, 1, 9], [9, 3, 1]])
def test_triplets_come_in_the_order_asked_for(order):
    weight = torch.diag(torch.arange(20.0, 0, -1))
    _, sizes, _ = singular_triplets(weight, torch.tensor(order))
    torch.testing.assert_close(sizes, torch.tensor([20.0 - place for place in order]))


def test_small_triplets_that_float32_squares_away(no_full_svd):
    """Condition 1e6: the Gram matrix in float32 would hold nothing of the smallest."""
    check(with_spectrum(torch.logspace(0, -6, 60)), torch.tensor([0, 30, 45, 58, 59]))


def test_repeated_singular_values(no_full_svd):
    check(with_spectrum(torch.tensor([3.0] * 20 + [1.0] * 40)), torch.arange(10, 24))
    check(torch.eye(40), torch.tensor([0, 1, 20, 39]))
    check(-2 * torch.eye(40)[torch.randperm(40)], torch.tensor([5, 6, 7]))


def test_a_weight_of_low_rank():
    weight = torch.randn(60, 5) @ torch.randn(5, 60)
    check(weight, torch.tensor([0, 4, 20, 40, 59]))
    zero_rows = torch.randn(60, 60)
    zero_rows[10:] = 0
    check(zero_rows, torch.tensor([0, 9, 10, 59]))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_tiny_and_huge_weights(scale):
    weight = torch.randn(60, 60) * scale
    chosen = torch.tensor([0, 20, 59])
    left, sizes, right = singular_triplets(weight, chosen)
    assert residuals(weight.double() / scale, left, sizes.double() / scale, right) <= 1e-4


def test_the_zero_weight():
    left, sizes, right = singular_triplets(torch.zeros(40, 30), torch.tensor([0, 3]))
    assert not sizes.any()
    torch.testing.assert_close(right @ right.T, torch.eye(2))
    torch.testing.assert_close(left.T @ left, torch.eye(2))


@pytest.mark.parametrize("failing", ["sytrd", "stein", "accuracy"])
def test_what_fails_falls_back_to_the_full_svd(failing, monkeypatch):
    """Each stage's failure is reported by LAPACK's own mark, or seen in the residual."""
    from scipy.linalg import lapack

    original = lapack.get_lapack_funcs

    def broken(names, arrays):
        functions = dict(zip(names, original(names, arrays), strict=True))
        if failing in functions:
            good = functions[failing]
            functions[failing] = lambda *args, **kwargs: (*good(*args, **kwargs)[:-1], 1)
        return list(functions.values())

    monkeypatch.setattr(lapack, "get_lapack_funcs", broken)
    if failing == "accuracy":
        monkeypatch.setattr(triplets, "TOLERANCE", 0.0)
    check(torch.randn(40, 40), torch.tensor([0, 10, 39]))


def test_many_triplets_and_double_precision_take_the_full_svd():
    check(torch.randn(12, 12), torch.arange(12))
    check(torch.randn(30, 30).double(), torch.tensor([0, 29]), tolerance=1e-12)
