"""Which weights get which rank, within a fixed number of trained parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

from peft import get_peft_model
from torch import Tensor, nn

from rosa.config import RosaConfig
from rosa.resample import check, look

MOST = 4
"""The largest rank of a weight, over the config's."""


def allocate_ranks(
    model: nn.Module,
    config: RosaConfig,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, int]:
    """Ranks by weight, by where the loss gradient lies, for as many parameters as ``config.r`` has.

    The singular values of each weight's gradient are found by a sketch (see `rosa.sketch`). Those
    with the most energy for the r (in + out) numbers that a direction costs get one: at least one
    and at most four times ``config.r`` directions a weight.

        config.rank_pattern = rosa.allocate_ranks(base_model, config, batches)
        model = peft.get_peft_model(base_model, config)

    Args:
        model: the pretrained model, without ROSA; it is left as it was.
        config: says which weights, and by `r` how many parameters. Not changed.
        batches: of training data, about four.
        loss: takes the model and a batch and returns the loss; None is ``model(**batch).loss``.

    Returns:
        For `RosaConfig.rank_pattern`: a regex for each weight's name, and its rank.

    Raises:
        ValueError: a batch gives no loss, or none of them a gradient.
    """
    look_config = copy.deepcopy(config)
    # Drawn at zero: the factors cost nothing to draw and the outputs are the pretrained model's.
    look_config.directions, look_config.rank_pattern = "zero", {}
    look_config.r = MOST * config.r
    watched = get_peft_model(model, look_config)
    try:
        jobs = check(watched)
        look(watched, jobs, batches, loss)
        costs: dict[str, int] = {}
        spectra: dict[str, Tensor] = {}
        for name, layer, adapter in jobs:
            name = name.removeprefix("base_model.model.")
            costs[name] = layer.in_features + layer.out_features
            if (sketch := layer.watched(adapter)) is not None:
                spectra[name] = sketch.energies()[: layer.r[adapter]]
    finally:
        watched.unload()
    if not any(energies.any() for energies in spectra.values()):
        raise ValueError(
            "the batches gave no gradient to allocate ranks by: their loss is 0, NaN or infinite, "
            "or depends on none of the target modules"
        )
    return {f"^{re.escape(name)}": rank for name, rank in _fill(costs, spectra, config.r).items()}


def _fill(costs: dict[str, int], spectra: dict[str, Tensor], r: int) -> dict[str, int]:
    """One direction for each weight, then those with the most energy a number, while there is room.

    Args:
        costs: numbers that a direction takes, by weight.
        spectra: energies of the gradient's directions, falling, by weight.
        r: the mean rank.
    """
    ranks = dict.fromkeys(costs, 1)
    room = (r - 1) * sum(costs.values())
    wanted = [
        (float(energy) / costs[name], name)
        for name, energies in spectra.items()
        for energy in energies[1:]
    ]
    for _, name in sorted(wanted, reverse=True):
        if costs[name] <= room:
            ranks[name] += 1
            room -= costs[name]
    return ranks
