"""How a layer's factors are drawn: by its config, from its weight, and by the gradient it saw."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rosa import subspace
from rosa.errors import UserError
from rosa.lowrank import LowRank
from rosa.sketch import Sketch

if TYPE_CHECKING:
    from rosa.layer import RosaLayer


def draw(
    layer: RosaLayer,
    adapter: str,
    weight: Tensor,
    change: LowRank | None = None,
    *,
    sides: Mapping[str, int],
    scaling: float,
    sketch: Sketch | None,
) -> tuple[Tensor, Tensor]:
    """Draw terms for an adapter's factors: A (k, in) and B (out, k). The layer is left as it is.

    Args:
        layer: its name, the adapter's config and the count of its draws decide.
        adapter: its name.
        weight: (out, in), in float32 or float64.
        change: to be added to the weight first.
        sides: how many terms are directions of the outputs ("left") and of the inputs ("right");
            k in all.
        scaling: see `subspace.draw`.
        sketch: the gradient that was seen; None draws without it.

    Raises:
        ValueError: the weight could not be decomposed.
    """
    config, rank = layer.rosa_config[adapter], sum(sides.values())
    norm, _ = layer.base_fingerprint() or (0.0, 0.0)
    draws = layer.rosa_offset[adapter].draws
    generator = subspace.generator(config.seed, f"{layer.name}.{adapter}", draws)
    by_energy = {"temperature": config.temperature, "generator": generator}
    known: dict[str, Tensor] = {}
    choose = None
    try:
        if sketch is not None and config.directions == "svd":
            choose = partial(sketch.places, count=round(config.informed * rank), **by_energy)
        elif sketch is not None:
            for side, wanted in sides.items():
                if count := round(config.informed * wanted):
                    known[side] = sketch.directions(side, count, **by_energy)
        return subspace.draw(
            weight,
            rank,
            directions=config.directions,  # type: ignore[arg-type]  # checked by RosaConfig
            triplets=config.triplets,  # type: ignore[arg-type]
            split=config.split,  # type: ignore[arg-type]
            scaling=scaling,
            change=change,
            # Of the pretrained weight: the speed of learning does not drift with the training.
            size=subspace.root_mean_square_size(norm, weight.shape),
            sides=None if sketch is None else sides,
            known=known,
            choose=choose,
            generator=generator,
        )
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise UserError(
            f"no subspace of layer {layer.name} could be drawn ({error}): check its weight for "
            "NaN and infinity, or use directions='orthonormal'"
        ) from error


def sides_of(layer: RosaLayer, adapter: str, places: Tensor) -> dict[str, int]:
    """How many of some terms are directions of each side: the left ones come first."""
    all_sides = subspace.rank_of_sides(layer.rosa_config[adapter].side, layer.r[adapter])
    left = int((places < all_sides["left"]).sum())
    return {"left": left, "right": len(places) - left}


def judged(layer: RosaLayer, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """By side that the gradient is seen of: which terms are directions of it, and their columns.

    Those are columns of B, (out, k), for the left side, and of A's transpose, (in, k).
    """
    config, r = layer.rosa_config[adapter], layer.r[adapter]
    columns = {"left": layer.rosa_B[adapter].detach(), "right": layer.rosa_A[adapter].detach().T}
    sides = subspace.rank_of_sides(config.side, r)
    places = dict(zip(sides, torch.arange(r).split(list(sides.values())), strict=True))
    if config.directions == "svd":  # a triplet is of both sides
        places = dict.fromkeys(sides, torch.arange(r))
    return {side: (places[side], columns[side][:, places[side]]) for side in sides if sides[side]}


def lasting(layer: RosaLayer, adapter: str, share: float) -> Tensor:
    """Which terms of a product hold enough of the gradient that was seen: (r,), of bool.

    Args:
        layer: that was watched; else none of them lasts.
        adapter: its name.
        share: of the energy that a fresh direction would hold; see `Sketch.lasting`.
    """
    sketch, r = layer.watched(adapter), layer.r[adapter]
    if sketch is None or sketch.is_empty() or layer.drawn(adapter) is None:
        return torch.zeros(r, dtype=torch.bool)
    lasts = torch.ones(r, dtype=torch.bool)
    for side, (places, columns) in judged(layer, adapter).items():
        lasts[places] &= sketch.lasting(side, columns, share)
    return lasts


def leave_lasting(layer: RosaLayer, adapter: str, sketch: Sketch, lasts: Tensor) -> None:
    """Take what terms that last hold out of a sketch: the draw is from what they leave."""
    for side, (places, columns) in judged(layer, adapter).items():
        sketch.without(side, columns[:, lasts[places]])
