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
