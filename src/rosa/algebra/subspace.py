"""The mathematics of ROSA on plain tensors: what a subspace is, and how one is drawn.

Nothing here knows of layers or models. Shapes follow a linear layer: a weight is (out, in), the
factor ``A`` is (r, in) and the factor ``B`` is (out, r), so that ``B @ A`` has the weight's shape.
A stack of weights (n, out, in), as of a mixture's experts, has a subspace of each.

Source: Abdel Hameed et al., "ROSA: Random Subspace Adaptation for Efficient Fine-Tuning",
arXiv 2407.07802, section 3. The paper writes a layer as x W and ``W = W_fixed + A B``: its W is
ours transposed, and its A, which holds the singular values, is our A.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from rosa.algebra.lowrank import LowRank, add_product, full_precision, transposed
from rosa.algebra.triplets import singular_triplets
from rosa.errors import UserError

Directions = Literal["svd", "orthonormal", "gradient", "zero"]

DIRECTIONS: tuple[str, ...] = get_args(Directions)


def generator(seed: int, name: str, draws: int) -> torch.Generator:
    """A random generator of a layer's own (`name`), for its draw number `draws`.

    It depends on nothing but its arguments: not on torch's global state, the order of the layers,
    the process or the device. So a run repeats, every data-parallel rank draws the same subspace,
    and the random state that a checkpoint needs is the count of draws.
    """
    digest = hashlib.sha256(f"{seed}\n{name}\n{draws}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def orthonormal_basis(
    size: int, rank: int, generator: torch.Generator, like: Tensor, known: Tensor | None = None
) -> Tensor:
    """Orthonormal columns, (size, rank): some that are known, and random ones.

    The random ones are uniform over all subspaces (orthogonal to what is known), and drawn on the
    CPU, so that every device gets the same, then moved to the device of `like`. Where `like` is a
    stack there are as many bases, (n, size, rank), and nothing is known.
    """
    count = rank if known is None else rank - known.shape[1]
    if known is not None and count == 0:
        return known
    shape = *like.shape[:-2], size, count
    columns = torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
    if known is not None:
        columns = torch.cat([known, columns], dim=1)
    return torch.linalg.qr(columns).Q


def _part_in_outputs(
    weight: Tensor, change: LowRank | None, u: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """A and B of U U^T W, of the weight with the change: B is U (out, r), as it is."""
    # The weight and the change are projected one by one: their sum is never written down.
    rows = transposed(u) @ weight
    if change is not None:
        add_product(rows, transposed(u) @ change.B, change.A)
    return rows.div_(scaling), u


def _part_in_inputs(
    weight: Tensor, change: LowRank | None, v: Tensor, size: float, scaling: float
) -> tuple[Tensor, Tensor]:
    """A and B of W V V^T, of the weight with the change: A is V^T (r, in) in the size given.

    So that B learns at the speed that a typical singular triplet gives it.
    """
    columns = weight @ v
    if change is not None:
        add_product(columns, change.B, change.A @ v)
    return transposed(v * size), columns.div_(size * scaling)


def root_mean_square_size(norm: float, shape: Sequence[int]) -> float:
    """The root mean square of a weight's singular values, from its Frobenius norm; 1 for zero."""
    *stack, out_features, in_features = shape
    return norm / (math.prod(stack) * min(out_features, in_features)) ** 0.5 or 1.0


@full_precision()
def draw(
    weight: Tensor,
    rank: int,
    *,
    directions: Directions = "svd",
    scaling: float = 1.0,
    change: LowRank | None = None,
    size: float | None = None,
    side: str | None = None,
    known: Tensor | Sequence[Tensor] | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw a subspace of a weight: ``scaling * B @ A`` is the weight's part in it.

    A holds the scale, as in the authors' code.

    Args:
        weight: (out, in), in float32 or float64; or a stack, (n, out, in).
        rank: r, at most min(out, in).
        directions: singular triplets of the weight, a uniform random subset; random orthonormal
            directions of its smaller side, which carry rank / min(out, in) of its energy, as
            random triplets do; those of the loss gradient (`known`); or "zero", which takes
            nothing of the weight: a random A and a zero B, as LoRA starts.
        scaling: the factor s that the layer multiplies the product with.
        change: to be added to the weight first, such as what was learned since the last draw.
        size: that A gives a direction of the inputs' side, times `scaling`; None takes the root
            mean square of the weight's singular values.
        side: of which the orthonormal directions are, "left" (the outputs', which B holds) or
            "right" (the inputs', which A holds); None takes that of `known`, or the smaller one.
        known: for ``directions="gradient"``, orthonormal directions of the outputs that the
            subspace shall have, (out, k); random ones complete them. None draws as "orthonormal"
            does. Of a stack, a list of them.
        generator: see `generator`.

    Returns:
        A ([n,] r, in) and B ([n,] out, r), in the dtype and on the device of the weight.

    Raises:
        ValueError: the rank does not fit the weight.
    """
    *stack, out_features, in_features = weight.shape
    most = min(out_features, in_features)
    if not 1 <= rank <= most:
        raise UserError(
            f"rank {rank} does not fit a weight of shape {tuple(weight.shape)}: choose 1 to {most}"
        )
    if directions == "zero":
        bound = in_features**-0.5  # as torch initialises a linear layer, and LoRA its A
        a = torch.rand(*stack, rank, in_features, generator=generator, dtype=weight.dtype) * 2 - 1
        return (a * bound).to(weight.device), weight.new_zeros(*stack, out_features, rank)
    if stack and (directions == "svd" or known is not None):
        draw_one = functools.partial(
            draw,
            rank=rank,
            directions=directions,
            scaling=scaling,
            size=size,
            side=side,
            generator=generator,
        )
        each = [
            draw_one(
                one,
                change=None if change is None else LowRank(change.B[i], change.A[i]),
                known=None if known is None else known[i],
            )
            for i, one in enumerate(weight)
        ]
        a, b = zip(*each, strict=True)
        return torch.stack(a), torch.stack(b)
    assert known is None or isinstance(known, Tensor)
    if directions == "svd":
        whole = weight if change is None else torch.addmm(weight, change.B, change.A)
        chosen = torch.randperm(most, generator=generator)[:rank].sort().values
        u, sizes, v = singular_triplets(whole, chosen)
        if side == "right":  # of A = 0, which stays, B would learn nothing
            usual = root_mean_square_size(float(torch.linalg.vector_norm(whole)), whole.shape)
            least = torch.finfo(sizes.dtype).eps * max(whole.shape) * usual
            sizes = sizes.where(sizes > least, usual)
        return (sizes / scaling)[:, None] * v, u
    if side is None:
        side = "left" if known is not None or out_features <= in_features else "right"
    if side == "left":
        u = orthonormal_basis(out_features, rank, generator, weight, known)
        return _part_in_outputs(weight, change, u, scaling)
    v = orthonormal_basis(in_features, rank, generator, weight, known)
    if size is None:
        whole = weight if change is None else weight + change.dense()
        size = root_mean_square_size(float(torch.linalg.vector_norm(whole)), weight.shape)
    return _part_in_inputs(weight, change, v, size / scaling, scaling)
