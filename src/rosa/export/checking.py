"""What an export is loaded onto, a model without weights, and compared by."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from rosa.algebra.lowrank import LowRank
from rosa.layers.in_model import rosa_layers


def without_weights(base: nn.Module) -> nn.Module:
    """A copy of a base model as it was before PEFT, whose weights take no memory."""
    memo: dict[int, Any] = {}
    for module in base.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _hollow(tensor)
    # The copy gets each layer without what PEFT put around it.
    for module in base.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
    for _, layer in reversed(list(rosa_layers(base))):  # what lies inside first
        base_layer = layer.get_base_layer()
        if layer.is_quantized:  # PEFT's LoRA is the same beside a plain layer
            base_layer = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
            base_layer.weight = _hollow(base_layer.weight)  # type: ignore[assignment]
        memo[id(layer)] = copy.deepcopy(base_layer, memo)
    skeleton = copy.deepcopy(base, memo)
    for name in ("peft_config", "hf_device_map"):
        if hasattr(skeleton, name):
            delattr(skeleton, name)
    return skeleton


def load_on_meta(base: nn.Module, folder: Path) -> PeftModel:
    """A ROSA adapter's folder on a copy of a plain model without weights; its buffers are there."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in base.parameters()
    }
    return PeftModel.from_pretrained(
        copy.deepcopy(base, memo), str(folder), low_cpu_mem_usage=True, torch_device="cpu"
    )


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that has one number in memory."""
    # PEFT casts the factors to a half-precision weight's dtype when it loads them this way.
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    number = torch.zeros((), dtype=torch.float32 if half else tensor.dtype)
    hollow = number.expand(tensor.shape)
    return nn.Parameter(hollow, requires_grad=False) if isinstance(tensor, nn.Parameter) else hollow


def same(change: LowRank, written: LowRank) -> bool:
    """Whether two products are the same matrix to the rounding of the written factors.

    Told from their products with a few random vectors: what differs, differs there too, and no
    matrix of a weight's size is needed.
    """
    one, other = ((each.B.shape[:-1], each.A.shape[-1]) for each in (change, written))
    if one != other:
        return False
    if written.A.is_meta or written.B.is_meta:  # the file did not have them
        return False
    b, a, written_b, written_a = (
        t.cpu().double() for t in (change.B, change.A, written.B, written.A)
    )
    probe = _probe(a.shape[-1])
    difference = float((b @ (a @ probe) - written_b @ (written_a @ probe)).norm())
    rounding = 8 * torch.finfo(written.B.dtype).eps * float(written_b.norm() * written_a.norm())
    # The SVD's own, in float64, where large terms take each other out.
    rounding += 1e-12 * float(b.norm() * a.norm())
    return difference <= rounding * 8**0.5


def is_rounding(change: LowRank) -> bool:
    """Whether the terms of a change take each other out."""
    probe = _probe(change.A.shape[-1])
    b, a = change.B.double(), change.A.double()
    return float((b @ (a @ probe)).norm()) <= 1e-6 * float(b.norm() * a.norm()) * 8**0.5


def _probe(features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, 8, generator=generator, dtype=torch.float64)
