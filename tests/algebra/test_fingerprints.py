from __future__ import annotations

import pytest
import torch

from rosa.algebra.fingerprints import _fixed_vectors, fingerprint, same_fingerprint


def test_a_fingerprint_survives_a_change_of_precision_and_sees_a_change_of_weight():
    weight = torch.randn(40, 30)
    mark = fingerprint(weight)
    half = fingerprint(weight.bfloat16())
    assert same_fingerprint(mark, half, torch.finfo(torch.bfloat16).eps)
    other = fingerprint(weight + 0.05 * torch.randn(40, 30))
    assert not same_fingerprint(mark, other, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_fingerprint_does_not_depend_on_torchs_default_precision(dtype):
    weight = torch.randn(19, 23)
    _fixed_vectors.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        found = fingerprint(weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert fingerprint(weight) == found
    _fixed_vectors.cache_clear()
    assert fingerprint(weight) == found
