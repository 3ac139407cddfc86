"""Which weights get which rank, within a fixed number of trained parameters.

The singular values of each weight's gradient are known from its sketch (see `rosa.sketch`). Those
with the most energy for the in + out numbers that a direction costs get one: at least one a weight,
and at most 8 more than it had.
"""

from __future__ import annotations

from torch import Tensor

from rosa.linear import RosaLinear


def allocate(jobs: list[tuple[str, RosaLinear, str]]) -> dict[tuple[str, str], int]:
    """Ranks by weight and adapter, for no more numbers in all than the factors have now.

    Args:
        jobs: (name, layer, adapter) of what is drawn together. Those that saw no gradient keep
            their rank.
    """
    ranks: dict[tuple[str, str], int] = {}
    costs: dict[tuple[str, str], int] = {}
    spectra: dict[tuple[str, str], Tensor] = {}
    for name, layer, adapter in jobs:
        sketch = layer.watched(adapter)
        if sketch is not None and not sketch.is_empty():
            key = name, adapter
            ranks[key] = layer.r[adapter]
            costs[key] = layer.in_features + layer.out_features
            spectra[key] = sketch.energies()
    return fill(ranks, costs, spectra)


def fill(ranks: dict, costs: dict, spectra: dict) -> dict:
    """One direction for each weight, then those with the most energy a number, while there is room.

    Args:
        ranks: of the weights now.
        costs: numbers that a direction takes, by weight.
        spectra: energies of the gradient's directions, falling, by weight.
    """
    new = dict.fromkeys(ranks, 1)
    room = sum((rank - 1) * costs[key] for key, rank in ranks.items())
    wanted = [
        (float(energy) / costs[key], key)
        for key, energies in spectra.items()
        for energy in energies[1:]
        if energy > 0
    ]
    for _, key in sorted(wanted, reverse=True):
        if costs[key] <= room:
            new[key] += 1
            room -= costs[key]
    return new
