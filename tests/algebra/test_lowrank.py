from __future__ import annotations

import math

import pytest
import torch

from rosa.algebra import lowrank
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


@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_size_of_a_sum_is_found_of_what_is_new_alone(stack, monkeypatch):
    def some(rank: int) -> LowRank:
        return LowRank(torch.randn(*stack, 7, rank).double(), torch.randn(*stack, rank, 5).double())

    def by_terms(matrix: LowRank) -> float:
        terms = [matrix[i : i + 1].dense() for i in range(matrix.rank)]
        return float(torch.stack([term.norm() for term in terms]).norm())

    total, read = some(2), list[int]()
    square = lowrank._square
    monkeypatch.setattr(lowrank, "_square", lambda b, a: read.append(a.shape[-2]) or square(b, a))
    for rank in (1, 4, 2):
        assert total.size == pytest.approx(by_terms(total))
        total = (total + some(rank)).to(dtype=torch.float64)
        if rank == 4:
            total = total.joined()  # of which not all was known
    assert total.size == pytest.approx(by_terms(total))
    assert read == [2, 1, 7, 2]
    assert LowRank.zero((*stack, 7, 5), torch.float32).size == 0


def test_one_number_that_is_none_is_found_among_large_ones():
    fine = [torch.randn(4, 3), torch.full((5,), 3e38), torch.randn(2).bfloat16(), torch.zeros(0)]
    assert are_finite(fine)
    for value in (math.nan, math.inf):
        assert not are_finite([*fine, torch.tensor([1.0, value])])
        assert not are_finite([*fine, torch.tensor([3e38, value, 3e38])])
