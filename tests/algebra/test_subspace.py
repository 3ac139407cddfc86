from __future__ import annotations

import itertools

import pytest
import torch

from rosa.algebra import subspace
from rosa.algebra.lowrank import LowRank
from rosa.algebra.subspace import DIRECTIONS

FACTORING = [name for name in DIRECTIONS if name != "zero"]  # "zero" takes nothing of the weight
SHAPES = [(6, 6), (5, 11), (12, 4), (1, 7)]


def draw(weight, rank, seed=0, **options):
    return subspace.draw(weight, rank, generator=subspace.generator(seed, "layer", 0), **options)


@pytest.mark.parametrize(("shape", "directions"), list(itertools.product(SHAPES, FACTORING)))
def test_the_product_is_the_weights_projection_onto_the_subspace(shape, directions):
    weight = torch.randn(shape, dtype=torch.float64)
    rank = min(shape[0], shape[1], 3)
    a, b = draw(weight, rank, directions=directions, scaling=0.5)
    assert a.shape == (rank, shape[1])
    assert b.shape == (shape[0], rank)
    product, rest = 0.5 * b @ a, weight - 0.5 * b @ a
    # The rest has nothing left in the subspace: its rank falls by that of the product.
    full = min(shape)
    assert torch.linalg.matrix_rank(rest, atol=1e-9, rtol=0.0) == full - rank
    # The parts are orthogonal, so the energies add up.
    energy = product.pow(2).sum() + rest.pow(2).sum()
    torch.testing.assert_close(energy, weight.pow(2).sum())


@pytest.mark.parametrize("count", [None, 0, 2, 3])
@pytest.mark.parametrize("shape", [(8, 8), (5, 11), (12, 4)])
def test_known_directions_of_the_outputs_are_taken_out_of_the_weight(shape, count):
    """What is left has nothing in the directions, and less rank; None takes the smaller side's."""
    weight = torch.randn(shape, dtype=torch.float64)
    known = None
    if count is not None:
        known = torch.linalg.qr(torch.randn(shape[0], count, dtype=torch.float64)).Q
    change = LowRank(*(torch.randn(n, 2, dtype=torch.float64) for n in shape))
    change = LowRank(change.B, change.A.T)
    a, b = draw(weight, 3, directions="gradient", change=change, known=known)
    rest = weight + change.dense() - b @ a
    assert torch.linalg.matrix_rank(b @ a, atol=1e-9, rtol=0.0) == 3
    left = known is not None or shape[0] <= shape[1]
    product = b.T @ rest if left else rest @ a.T
    torch.testing.assert_close(product, torch.zeros_like(product), rtol=0, atol=1e-12)
    if known is not None:
        torch.testing.assert_close(b @ (b.T @ known), known)


def test_zero_directions_start_as_lora_does():
    a, b = draw(torch.randn(40, 100, dtype=torch.float64), 30, directions="zero")
    assert not b.any()
    assert a.abs().max() <= 0.1  # uniform, one over the root of the inputs at most
    torch.testing.assert_close(a.std(), torch.tensor(0.1 / 3**0.5).double(), rtol=0.1, atol=0)


def test_svd_is_the_papers_factoring():
    """The paper's layer is x W, with W (in, out): its U S is what stands beside the inputs."""
    weight = torch.randn(9, 6, dtype=torch.float64)
    a, b = draw(weight, 6, directions="svd")
    torch.testing.assert_close(b.T @ b, torch.eye(6, dtype=torch.float64))
    sizes = torch.linalg.svdvals(weight)
    torch.testing.assert_close(a @ a.T, torch.diag(sizes**2))


@pytest.mark.parametrize("shape", [(8, 8), (5, 11), (12, 4)])
def test_directions_of_the_inputs_have_the_root_mean_square_singular_value_as_size(shape):
    """On A, and those of the outputs have 1 on B; None of either takes the smaller side's."""
    weight = torch.randn(shape, dtype=torch.float64)
    size = torch.linalg.svdvals(weight).pow(2).mean().sqrt()
    a, b = draw(weight, 3, directions="orthonormal")
    gram = b.T @ b if shape[0] <= shape[1] else a @ a.T / size**2
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64))


def test_random_triplets_are_a_uniform_subset_without_replacement():
    weight = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    counts, draws = torch.zeros(6), 3000
    pairs = torch.zeros(6, 6)
    for seed in range(draws):
        a, _ = draw(weight, 2, seed=seed, directions="svd")
        chosen = (a.norm(dim=1).round().long() - 1).tolist()
        assert len(set(chosen)) == 2
        counts[chosen] += 1
        pairs[tuple(sorted(chosen))] += 1
    # Chi-square of the 15 pairs against uniform; 14 degrees of freedom, p = 1e-4 at 42.6.
    found = pairs[torch.triu(torch.ones(6, 6), diagonal=1).bool()]
    assert ((found - draws / 15) ** 2 / (draws / 15)).sum() < 42.6
    assert counts.min() > 0


def test_draws_do_not_depend_on_the_global_random_state():
    weight = torch.randn(6, 6)
    for directions in DIRECTIONS:
        torch.manual_seed(1)
        first = draw(weight, 2, directions=directions)
        state = torch.get_rng_state()
        torch.manual_seed(2)
        second = draw(weight, 2, directions=directions)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        torch.manual_seed(1)
        draw(weight, 2, directions=directions)
        assert torch.equal(torch.get_rng_state(), state)


def test_draws_differ_by_seed_layer_and_count():
    states = {
        subspace.generator(*args).initial_seed()
        for args in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    }
    assert len(states) == 4


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_zero_weight_can_be_drawn_and_learns(directions):
    a, b = draw(torch.zeros(5, 6), 2, directions=directions)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    assert (a != 0).any() or (b != 0).any()


@pytest.mark.parametrize("directions", [d for d in DIRECTIONS if d != "zero"])
@pytest.mark.parametrize(("side", "stays"), [("left", 1), ("right", 0)])
@pytest.mark.parametrize("true_rank", [0, 1])
def test_a_factor_that_stays_is_not_zero(directions, side, stays, true_rank):
    """The other one would have no gradient: of a weight of less rank than the subspace, too."""
    weight = torch.randn(5, true_rank) @ torch.randn(true_rank, 6)
    for _ in range(5):
        factors = draw(weight, 3, directions=directions, side=side)
        assert (factors[stays].norm(dim=1 - stays) > 1e-3).all()


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(ValueError, match="choose 1 to 5"):
        draw(torch.randn(5, 6), rank)
