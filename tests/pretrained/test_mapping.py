"""Pretrained weights read from their files, where else copies of them are kept in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model

from rosa import RosaConfig, map_pretrained, resample
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.files import WeightFile
from tests.architectures import ARCHITECTURES
from tests.helpers import moved
from tests.models import Mlp, tiny_bert, tiny_gpt2

HALF = [torch.bfloat16, torch.float16]


def loaded(build: Any, folder: Any, dtype: torch.dtype, **options: Any) -> Any:
    """A model as transformers loads it from its files, with an adapter."""
    model = build().to(dtype)
    model.save_pretrained(folder, max_shard_size="4KB")
    base = type(model).from_pretrained(folder, dtype=dtype)
    return get_peft_model(base, RosaConfig(r=2, target_modules="all-linear", **options)).eval()


def weights(model: Any) -> list[torch.Tensor]:
    return [layer.base_weight.parameter.detach().clone() for _, layer in rosa_layers(model)]


def kept(model: Any) -> list[Any]:
    return [layer.base_weight.kept for _, layer in rosa_layers(model)]


def a_life(model: Any) -> list[list[torch.Tensor]]:
    """What the weights are after draws, switches, merging, disabling."""
    seen = []
    for round_ in range(3):
        torch.manual_seed(round_)
        moved(model)
        resample(model)
        seen.append(weights(model))
    with model.disable_adapter():
        seen.append(weights(model))
    if "other" not in model.peft_config:
        model.add_adapter("other", RosaConfig(r=3, target_modules="all-linear", seed=4))
    model.set_adapter("other")
    seen.append(weights(model))
    model.set_adapter("default")
    model.merge_adapter()
    seen.append(weights(model))
    model.unmerge_adapter()
    seen.append(weights(model))
    return seen


@pytest.mark.parametrize("directions", ["svd", "zero"])
@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_float32_weights_are_exact_then(build, directions, tmp_path):
    model = loaded(build, tmp_path, torch.float32, directions=directions)
    pretrained = {
        n: p.clone()
        for n, p in type(model.get_base_model()).from_pretrained(tmp_path).named_parameters()
    }
    assert map_pretrained(model) == sum(weight.nbytes for weight in weights(model))
    for seen in (a_life(model), a_life(model)):
        assert len(seen) == 7
    with model.disable_adapter():
        for path, layer in rosa_layers(model):
            name = path.removeprefix("base_model.model.") + ".weight"
            assert torch.equal(layer.base_weight.parameter, pretrained[name]), name
    assert all(isinstance(each, WeightFile) for each in kept(model))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2])
def test_a_model_whose_files_are_mapped_is_the_same_to_the_last_bit(build, dtype, tmp_path):
    mapped = loaded(build, tmp_path, dtype)
    copied = copy.deepcopy(mapped)
    size = sum(weight.nbytes for weight in weights(mapped))
    assert map_pretrained(mapped) == size
    for expected, found in zip(a_life(copied), a_life(mapped), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(isinstance(each, WeightFile) for each in kept(mapped))
    assert all(isinstance(each, torch.Tensor) for each in kept(copied))
    plain = mapped.unload()
    again = type(plain).from_pretrained(tmp_path, dtype=dtype)
    torch.testing.assert_close(plain.state_dict(), again.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(n for n, a in ARCHITECTURES.items() if a.half))
def test_every_architecture(name, tmp_path):
    architecture = ARCHITECTURES[name]
    base = architecture.build(1).to(torch.bfloat16)
    base.save_pretrained(tmp_path)
    base = type(base).from_pretrained(tmp_path, dtype=torch.bfloat16)
    how = {"target_modules": architecture.target_modules, **architecture.adapter}
    model = get_peft_model(base, RosaConfig(r=2, directions="orthonormal", **how))
    before = weights(model)
    mapped = map_pretrained(model)
    stored = sum(type(each) is WeightFile for each in kept(model))
    assert mapped
    assert stored >= len(before) / 2  # some are stored otherwise than they are in memory
    with model.disable_adapter():
        pretrained = weights(model)
    fresh = dict(type(base).from_pretrained(tmp_path, dtype=torch.bfloat16).named_parameters())
    for (path, layer), weight in zip(rosa_layers(model), pretrained, strict=True):
        key = f"{path}.{layer.weight_path}".replace(".base_layer", "")
        expected = fresh.get(key.removeprefix("base_model.model."))
        if expected is not None:
            assert torch.equal(weight, expected), path
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_a_weight_that_is_not_its_files_is_copied(tmp_path):
    model = loaded(tiny_bert, tmp_path, torch.bfloat16)
    (_, first), (_, second), *_ = rosa_layers(model)
    with model.disable_adapter(), torch.no_grad():
        first.base_weight.parameter.add_(1)
    model.bfloat16()
    all_of_it = sum(weight.nbytes for weight in weights(model))
    assert map_pretrained(model) == all_of_it - first.base_weight.parameter.nbytes
    assert isinstance(first.base_weight.kept, torch.Tensor)
    assert isinstance(second.base_weight.kept, WeightFile)
    with model.disable_adapter(), torch.no_grad():  # and one that is changed later
        second.base_weight.parameter.add_(1)
        wanted = second.base_weight.parameter.clone()
    moved(model)
    resample(model)
    assert isinstance(second.base_weight.kept, torch.Tensor)
    with model.disable_adapter():
        assert torch.equal(second.base_weight.parameter, wanted)


@pytest.mark.parametrize("how", ["gone", "another"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_file_that_is_gone_or_another_is_said_before_anything_is_drawn(how, which, tmp_path):
    model = loaded(tiny_bert, tmp_path / "base", torch.bfloat16)
    map_pretrained(model)
    moved(model)
    path = sorted({each.path for each in kept(model)})[which]
    before, aside = model.state_dict(), path.rename(tmp_path / "aside")
    before = {key: value.clone() for key, value in before.items()}
    if how == "another":
        path.write_bytes(aside.read_bytes()[:-900] + bytes(900))
    with pytest.raises(ValueError, match=r"\.safetensors, from which .* is gone or was changed"):
        resample(model)
    with pytest.raises(ValueError, match=r"\.safetensors, from which .* is gone or was changed"):
        model.merge_adapter()
    path.unlink(missing_ok=True)
    path.write_bytes(aside.read_bytes())  # by its content, not by its time
    model.unmerge_adapter()  # what of it could be merged
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    resample(model)


def test_what_cannot_be_mapped_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no ROSA layers"):
        map_pretrained(Mlp(torch.float32))
    model = get_peft_model(Mlp(torch.bfloat16), RosaConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="nobody knows what the model was loaded from"):
        map_pretrained(model)
    with pytest.raises(ValueError, match="no safetensors files in"):
        map_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="is no folder, and no model in the hub's cache"):
        map_pretrained(model, "nobody/nothing")
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hold none of the adapted weights"):
        map_pretrained(model, tmp_path)
