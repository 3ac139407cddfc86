"""bitsandbytes' 4-bit weights, kept in the order in which they are stored.

On a CPU with AVX512-BF16 units a ``Linear4bit`` packs its weight anew at its first pass in eval
mode, for a faster product. No gradient goes through that product, so a training that goes on after
an evaluation fails or, where layers have no bias, goes on without the gradients of what lies
below; and what dequantizes the weight then misreads it.
"""

from __future__ import annotations

import sys
import warnings

from torch import nn

_PACKS = "support_avx512bf16_for_cpu"


def keep_order(model: nn.Module) -> None:
    """Let none of a model's 4-bit weights be packed anew, and put those back that were.

    Packing has rounded their scales to bfloat16, of which a warning tells.
    """
    if "bitsandbytes" not in sys.modules:
        return
    rounded = []
    for name, module in model.named_modules():
        if not hasattr(module, _PACKS):
            continue
        setattr(module, _PACKS, False)
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # puts the weight back, and scales that are quantized themselves
            rounded.append(name)
        if state is not None and state.absmax.dim() == 2:  # other scales it leaves by columns
            state.absmax = state.absmax.T.reshape(-1).float()
    if rounded:
        warnings.warn(
            f"a pass in eval mode has rounded the scales of {len(rounded)} 4-bit weights, such as "
            f"{rounded[0]}, to bfloat16 (bitsandbytes' packing for CPUs with AVX512-BF16): for "
            "the exact weights attach or load the adapter before the first pass",
            stacklevel=2,
        )
