"""A few singular triplets of a matrix, chosen by index, without the full decomposition.

The triplets are eigenpairs of the Gram matrix of the smaller side. It is brought to tridiagonal
form, the chosen eigenvalues are found by bisection and their vectors by inverse iteration (LAPACK's
sytrd, stebz, stein, ormqr): the work that a full SVD does for the other triplets falls away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 5e-5
"""Largest residual ||W^T u - sigma v|| of a float32 computation, over the largest sigma."""

# With more of all triplets than this, the full decomposition is the cheaper one.
_MOST = 0.25


def singular_triplets(weight: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets at some places of the list that falls from the largest to the smallest.

    Squaring a matrix loses its small triplets, so a float32 result that misses `TOLERANCE` is
    computed again in float64, where the Gram matrix of float32 numbers holds them all. A float64
    weight, and whatever fails to converge, takes torch's full SVD.

    Args:
        weight: (out, in), on any device; finite.
        chosen: places in the list, (r,), each at most once.

    Returns:
        The left vectors (out, r), the values (r,) and the right vectors as rows (r, in), in the
        order of `chosen`, the weight's dtype and on its device.

    Raises:
        torch.linalg.LinAlgError: not even the full SVD converged.
    """
    if weight.dtype == torch.float32 and len(chosen) <= _MOST * min(weight.shape):
        tall = weight.shape[0] >= weight.shape[1]
        matrix = (weight if tall else weight.T).cpu()
        for dtype in (torch.float32, torch.float64):
            found = _of_gram(matrix, chosen, dtype)
            if found is not None:
                left, sizes, right = (part.to(weight) for part in found)
                return (left, sizes, right.T) if tall else (right, sizes, left.T)
    u, sizes, vh = torch.linalg.svd(weight, full_matrices=False)
    chosen = chosen.to(weight.device)
    return u[:, chosen], sizes[chosen], vh[chosen]


def _of_gram(
    weight: Tensor, chosen: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Triplets of a tall matrix (m, n), vectors as columns; None if they are not accurate.

    All by SciPy: its BLAS and torch's, called in turn, would keep each other's threads waiting.
    """
    import numpy as np
    from scipy.linalg import blas

    matrix = weight.to(dtype).numpy()
    scale = float(abs(matrix).max())
    if scale == 0:
        return None
    matrix = matrix / scale  # squares of tiny and of huge numbers stay in range
    found = _eigenvectors(matrix, matrix.shape[1] - chosen.numpy())
    if found is None:
        return None
    right, largest = found
    (gemm,) = blas.get_blas_funcs(("gemm",), (matrix,))
    # Of orthonormal columns even where a singular value is zero.
    left, triangle = np.linalg.qr(gemm(1.0, matrix.T, right, trans_a=1))
    sizes = triangle.diagonal()
    left, sizes = left * np.where(sizes < 0, -1, 1).astype(left.dtype), abs(sizes)
    residual = np.linalg.norm(gemm(1.0, matrix.T, left) - right * sizes, axis=0).max()
    if not residual <= TOLERANCE * largest:
        return None
    return torch.from_numpy(left), torch.from_numpy(sizes * scale), torch.from_numpy(right)


def _eigenvectors(matrix: Any, places: Any) -> tuple[Any, float] | None:
    """Eigenvectors (n, r) of the Gram matrix, and its largest eigenvalue's root; None on failure.

    Args:
        matrix: tall, (m, n), a NumPy array.
        places: which ones, counted from 1 at the smallest.
    """
    import numpy as np
    from scipy.linalg import blas, lapack

    functions = ("sytrd", "stebz", "stein", "ormqr")
    sytrd, stebz, stein, ormqr = lapack.get_lapack_funcs(functions, (matrix,))
    (syrk,) = blas.get_blas_funcs(("syrk",), (matrix,))
    n = matrix.shape[1]
    gram = syrk(1.0, matrix.T, lower=1)
    reflectors, diagonal, beside, tau, info = sytrd(gram, lower=1, lwork=64 * n, overwrite_a=1)
    values, blocks, ends, failed = [], [], None, info != 0
    for place in (*places, n):
        _, value, block, ends, info = stebz(diagonal, beside, 2, 0.0, 0.0, place, place, 0.0, "B")
        values.append(value[0])
        blocks.append(block[0])
        failed |= info != 0
    largest = max(values.pop(), 0.0) ** 0.5
    blocks.pop()
    order = np.lexsort((values, blocks))  # as stein asks: by block, rising within it
    padded = np.zeros(n, dtype=np.int32)
    padded[: len(blocks)] = np.asarray(blocks)[order]
    inner, info = stein(diagonal, beside, np.asarray(values)[order], padded, ends)
    if failed or info != 0:
        return None
    vectors = np.empty_like(inner)
    vectors[:, order] = inner
    below, _, info = ormqr("L", "N", reflectors[1:, :-1], tau, vectors[1:], lwork=64 * n)
    vectors[1:] = below
    if info != 0:
        return None
    return np.linalg.qr(vectors)[0], largest
