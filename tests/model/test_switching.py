"""Ten adapters on one base: a thousand switches change nothing, not the last bit of a weight."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from rosa import RosaConfig, resample
from rosa.layers.in_model import rosa_layers
from tests.helpers import moved
from tests.models import Mlp

FILE = "adapter_model.safetensors"
HOW = [
    {"directions": directions, "trained": trained}
    for directions in ("orthonormal", "svd", "zero")
    for trained in ("both", "B")
]


def weights(model: Any) -> list[torch.Tensor]:
    return [layer.base_weight.parameter.detach().clone() for _, layer in rosa_layers(model)]


def check(model: Any, expected: list[torch.Tensor], exactly: bool = True) -> None:
    off = 0.0 if exactly else 1e-6
    torch.testing.assert_close(weights(model), expected, rtol=off, atol=off)


def ten_adapters(base: Any) -> tuple[Any, list[str]]:
    model: Any = None
    names = [f"task{i}" for i in range(10)]
    for i, name in enumerate(names):
        how = {"r": 1 + i % 3, "seed": i, "target_modules": ["first", "middle", "last"]}
        config = RosaConfig(**how, **HOW[i % len(HOW)])
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        for _ in range(i % 4):
            moved(model, 0.1)
            resample(model)
        moved(model, 0.1)
    return model, names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_switches_between_ten_adapters_are_exact(dtype, tmp_path):
    base, half = Mlp(dtype), dtype != torch.float32
    pretrained = [layer.weight.detach().clone() for layer in (base.first, base.middle, base.last)]
    model, names = ten_adapters(copy.deepcopy(base))
    with model.disable_adapter():
        check(model, pretrained, exactly=half)  # in float32 to a rounding, as the first one left it
        disabled = weights(model)
    active, merged = {}, {}
    for name in names:
        model.set_adapter(name)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        alone: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        check(model, weights(alone), exactly=half)
        active[name] = weights(model)
        model.merge_adapter()
        alone.merge_adapter()
        check(model, weights(alone), exactly=half)
        merged[name] = weights(model)
        model.unmerge_adapter()
    for step in range(1000):
        name = random.choice(names)
        model.set_adapter(name)
        check(model, active[name])
        if step % 7 == 0:
            with model.disable_adapter():
                check(model, disabled)
        if step % 11 == 0:
            model.merge_adapter()
            check(model, merged[name])
            model.unmerge_adapter()
    for name in names:  # and none has changed another's file
        before = load_file(tmp_path / name / FILE)
        model.save_pretrained(tmp_path / "again", selected_adapters=[name])
        after = load_file(tmp_path / "again" / name / FILE)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
