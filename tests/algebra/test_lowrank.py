from __future__ import annotations

import pytest
import torch

from rosa.algebra.lowrank import LowRank, are_finite


def test_compression_loses_nothing_and_finds_the_rank():
    terms = LowRank(torch.randn(9, 4).double(), torch.randn(4, 7).double())
    doubled = terms + LowRank(-2 * terms.B, terms.A) + terms + terms  # 13 x 7, of rank 4
    small = doubled.compressed()
    assert doubled.rank == 16
    assert small.rank == 4
    torch.testing.assert_close(small.dense(), doubled.dense())


def test_terms_that_cancel_compress_to_nothing():
    terms = LowRank(torch.zeros(5, 2), torch.randn(2, 6))
    assert terms.compressed().rank == 0
    assert LowRank.zero((5, 6), torch.float32).compressed().rank == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_however_large_and_not_finite(dtype):
    large = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)  # its norm overflows
    assert are_finite([large, -large, large[:0]])
    for broken in (float("nan"), float("inf"), -float("inf")):
        spoilt = large.clone()
        spoilt[1, 2] = broken
        assert not are_finite([large, spoilt])


@pytest.mark.parametrize("shape", [(9, 7), (3, 9, 7)])
@pytest.mark.parametrize("error", [1e-3, 0.1, 0.5])
def test_compressing_to_an_error_makes_no_larger_one_and_drops_what_it_can(shape, error):
    *stack, out_features, in_features = shape
    b = torch.randn(*stack, out_features, 12).double()
    a = (torch.randn(*stack, 12, in_features) * 2.0 ** -torch.arange(12)[:, None]).double()
    whole = LowRank(b, a)
    small = whole.compressed(error)
    norms = torch.linalg.matrix_norm(whole.dense())
    assert bool((torch.linalg.matrix_norm(whole.dense() - small.dense()) <= error * norms).all())
    sizes = torch.linalg.svdvals(whole.dense())
    rest = sizes.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    assert small.rank == int((rest > error * norms[..., None]).sum(-1).max())
