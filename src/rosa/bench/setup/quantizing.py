"""Frozen weights in fewer bits, as QLoRA has them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rosa.errors import UserError
from rosa.packing import keep_order

if TYPE_CHECKING:
    from torch import nn

LOAD_IN = ("full", "8bit", "4bit", "hqq")
"""How the weights may be loaded: bitsandbytes' 8 bits, its 4 (nf4), or 4 of HQQ's."""
HEADS = ("classifier", "score", "pre_classifier", "lm_head", "embed_out")
"""Names of heads, which stay as they are."""


def check_load_in(load_in: str) -> None:
    """Raise UserError unless weights can be loaded so."""
    if load_in not in LOAD_IN:
        raise UserError(f"load_in must be one of {', '.join(LOAD_IN)}: {load_in}")
    package = "hqq" if load_in == "hqq" else "bitsandbytes"
    if load_in != "full" and find_spec(package) is None:
        raise UserError(
            f"load_in {load_in} needs {package}: pip install 'rosa-finetune[quantized]'"
        )


def quantization(load_in: str, half: bool) -> dict[str, Any]:
    """The arguments of from_pretrained.

    Args:
        load_in: see `LOAD_IN`.
        half: whether to compute in bfloat16.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(HEADS))
    elif load_in == "4bit":
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
            llm_int8_skip_modules=list(HEADS),
        )
    else:
        return {}
    return {"quantization_config": how}


def quantize(load_in: str, model: nn.Module) -> None:
    """Quantize what from_pretrained does not: by HQQ, 4 bits in groups of 64 numbers."""
    import torch
    from torch import nn

    keep_order(model)
    if load_in != "hqq":
        return
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if type(module) is not nn.Linear or child in HEADS:
            continue
        weight = module.weight
        with torch.no_grad():
            found = HQQLinear(
                module,
                BaseQuantizeConfig(nbits=4, group_size=64),
                compute_dtype=weight.dtype,
                device=str(weight.device),
            )
        setattr(model.get_submodule(parent), child, found)


def quantized(model: nn.Module) -> list[str]:
    """The names of the layers that HQQ holds, which PEFT does not count as linear."""
    return [name for name, module in model.named_modules() if type(module).__name__ == "HQQLinear"]
