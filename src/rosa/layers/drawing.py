"""How a layer's factors are drawn: by its config, from its weight, and by the gradient it saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rosa.algebra import subspace
from rosa.algebra.lowrank import LowRank
from rosa.algebra.sketch import Sketch
from rosa.errors import UserError

if TYPE_CHECKING:
    from rosa.layers.base import RosaLayer


def draw(
    layer: RosaLayer,
    adapter: str,
    weight: Tensor,
    change: LowRank | None = None,
    *,
    sketch: Sketch | None,
) -> tuple[Tensor, Tensor]:
    """Draw an adapter's factors: A (r, in) and B (out, r). The layer is left as it is.

    Args:
        layer: its name, the adapter's config and the count of its draws decide.
        adapter: its name.
        weight: (out, in), in float32 or float64.
        change: to be added to the weight first.
        sketch: the gradient that was seen; None draws without it.

    Raises:
        ValueError: the weight could not be decomposed.
    """
    config, r = layer.rosa_config[adapter], layer.r[adapter]
    sides = subspace.rank_of_sides(config.side, r)
    norm, _ = layer.base_fingerprint() or (0.0, 0.0)
    draws = layer.rosa_offset[adapter].draws
    generator = subspace.generator(config.seed, f"{layer.name}.{adapter}", draws)
    known: dict[str, Tensor] = {}
    try:
        if sketch is not None:
            known = {side: sketch.directions(side, k) for side, k in sides.items() if k}
        return subspace.draw(
            weight,
            r,
            directions=config.directions,  # type: ignore[arg-type]  # checked by RosaConfig
            scaling=layer.scaling[adapter],
            change=change,
            # Of the pretrained weight: the speed of learning does not drift with the training.
            size=subspace.root_mean_square_size(norm, weight.shape),
            sides=None if sketch is None else sides,
            known=known,
            generator=generator,
        )
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise UserError(
            f"no subspace of layer {layer.name} could be drawn ({error}): check its weight for "
            "NaN and infinity, or use directions='orthonormal'"
        ) from error
