from __future__ import annotations

import torch

from rosa.lowrank import LowRank


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
    assert LowRank.zero(5, 6, torch.float32).compressed().rank == 0
