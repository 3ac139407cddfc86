"""The product of a linear layer whose weight tensor parallelism has cut: a shard in each process.

Cut by its outputs (``colwise``), each process has rows of W and so of B, and all of A; cut by its
inputs (``rowwise``), columns of W and so of A, and all of B. Between the factors lie r numbers a
token: these alone are summed over the processes, in the forward pass of the second kind and in the
backward pass of the first.

Source: Shoeybi et al., "Megatron-LM" (2019), section 3, for the two cuts and where they are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosa.algebra.sketch import Sketch
from rosa.errors import UserError
from rosa.layers.adapter import Adapter
from rosa.layers.base import RosaLayer
from rosa.pretrained.sharding import cut_dim, from_first, is_dtensor


def parallel_product(layer: RosaLayer, adapter: Adapter, x: Tensor) -> Tensor:
    """``s B A x`` of an adapter, as a DTensor: cut as the layer's outputs are, or whole.

    Args:
        layer: linear.
        adapter: its.
        x: the inputs (..., in) that the base layer takes: whole, or this process's (..., in / n).
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    (a, b), dropout = adapter.factors, layer.rosa_dropout[adapter.name]
    weight: Any = layer.base_weight.parameter
    mesh, by_outputs = weight.device_mesh, cut_dim(weight) == 0
    if (cut_dim(a), cut_dim(b)) != ((None, 0) if by_outputs else (1, None)):
        raise UserError(
            f"layer {layer.name} is called while its weights are in parts over the processes: call "
            "the module that fully_shard was called on"
        )
    x = _whole(x) if by_outputs else _own(x, layer.in_features, mesh)
    x = layer._cast_input_dtype(x, a.dtype)
    x = _dropped(x, dropout, weight) if by_outputs else dropout(x)
    hidden = F.linear(x, _local(a)) * adapter.scaling
    if by_outputs:  # the gradient is of these outputs: it is summed on its way back
        hidden = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
        hidden = hidden.to_local(grad_placements=[Partial()])
        return _as_shard(F.linear(hidden, _local(b)), layer.out_features, mesh)
    hidden = DTensor.from_local(hidden, mesh, [Partial()], run_check=False)
    hidden = hidden.redistribute(placements=[Replicate()]).to_local()
    return DTensor.from_local(F.linear(hidden, _local(b)), mesh, [Replicate()], run_check=False)


def add_parallel(result: Tensor, product: Tensor) -> Tensor:
    """A base layer's outputs, in whatever layout it gives them, plus a `parallel_product`."""
    from torch.distributed.tensor import Replicate, Shard

    how: Any = product
    if is_dtensor(result):
        if any(p.is_partial() for p in result.placements):  # type: ignore[attr-defined]
            result = result.redistribute(placements=how.placements)  # type: ignore[attr-defined]
        return result + how.redistribute(placements=result.placements)  # type: ignore[attr-defined]
    is_whole = result.shape[-1] == product.shape[-1]
    wanted = Replicate() if is_whole else Shard(product.dim() - 1)
    return result + how.redistribute(placements=[wanted]).to_local()


def look_at_all(layer: RosaLayer, sketch: Sketch, grad: Tensor, x: Tensor) -> None:
    """Show a sketch the gradient of all outputs, and all inputs."""
    mesh = layer.base_weight.parameter.device_mesh  # type: ignore[attr-defined]
    sketch.add(_gathered(grad, layer.out_features, mesh), _gathered(x, layer.in_features, mesh))


def _dropped(x: Tensor, dropout: nn.Module, weight: Tensor) -> Tensor:
    """Dropout of inputs that every process has all of: of the same ones in all."""
    if not isinstance(dropout, nn.Dropout) or not dropout.training:
        return x
    # By torch's own generator, which is set back for what is computed again (checkpointing).
    seed = from_first(torch.randint(1 << 62, (1,)).to(x.device), weight)
    shared = torch.Generator(x.device).manual_seed(int(seed))
    kept = 1 - dropout.p
    return x * (torch.empty_like(x).bernoulli_(kept, generator=shared) / kept)


def _local(factor: Tensor) -> Tensor:
    return factor.to_local()  # type: ignore[attr-defined]


def _whole(x: Tensor) -> Tensor:
    """Inputs that every process has all of."""
    from torch.distributed.tensor import Replicate

    how: Any = x
    return how.redistribute(placements=[Replicate()]).to_local() if is_dtensor(x) else x


def _own(x: Tensor, size: int, mesh: Any) -> Tensor:
    """Of inputs (..., size), this process's shard."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not is_dtensor(x):
        if x.shape[-1] != size:
            return x
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    how: Any = x
    return how.redistribute(placements=[Shard(x.dim() - 1)]).to_local()


def _as_shard(here: Tensor, size: int, mesh: Any) -> Tensor:
    """A shard (..., part) of a tensor (..., size), as that tensor."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*here.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    cut = [Shard(here.dim() - 1)]
    return DTensor.from_local(here, mesh, cut, run_check=False, shape=shape, stride=stride)


def _gathered(here: Tensor, size: int, mesh: Any) -> Tensor:
    """All of a tensor (..., size) of which a shard is here, or all."""
    if not is_dtensor(here):
        if here.shape[-1] == size:
            return here
        here = _as_shard(here, size, mesh)
    return here.full_tensor()  # type: ignore[attr-defined]
