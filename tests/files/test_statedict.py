"""Whole models by every saver and loader, in one file or many: the same model, or an error."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from huggingface_hub import save_torch_state_dict
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from rosa import RosaConfig, resample
from rosa.algebra.lowrank import LowRank
from rosa.layers.in_model import rosa_layers
from tests.models import Mlp, tiny_gpt2, tiny_llama

IDS = torch.randint(1, 50, (3, 9))


BASES = {"llama": tiny_llama, "gpt2": lambda: tiny_gpt2(tied=False)}


def attach(base, **options):
    return get_peft_model(base, RosaConfig(r=2, target_modules="all-linear", **options))


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def train(model, optimizer, draws=2):
    for draw in range(draws + 1):
        if draw:
            resample(model, optimizer)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request):
    """A trained model, and another fresh one on a copy of its base with other subspaces."""
    name = ["llama", "gpt2"][int(torch.randint(2, ()))]
    base = BASES[name]().to(request.param).eval()
    model, other = attach(copy.deepcopy(base)), attach(copy.deepcopy(base), seed=5)
    train(model, adam(model))
    return model.eval(), other.eval(), base


def check(other, model, base):
    expected = model(IDS).logits
    assert far(expected, base(IDS).logits) > 0.01
    assert far(other(IDS).logits, expected) == 0.0
    with model.disable_adapter(), other.disable_adapter():
        assert far(other(IDS).logits, model(IDS).logits) == 0.0
    for (_, one), (_, two) in zip(rosa_layers(model), rosa_layers(other), strict=True):
        assert one.adapters["default"].draws == two.adapters["default"].draws
    resample(other)  # and it goes on
    eps = 6e-2 if base.dtype == torch.bfloat16 else 1e-5
    assert far(other(IDS).logits, expected) <= eps * float(expected.abs().max())


def far(one, other):
    return float((one - other).abs().max())


def by_safetensors(model, other, folder):
    save_model(model, str(folder / "model.safetensors"))
    load_model(other, str(folder / "model.safetensors"))


def by_the_hub(model, other, folder):
    save_torch_state_dict(model.state_dict(), folder)
    load_checkpoint_in_model(other, str(folder), strict=True)


def by_torch(model, other, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    other.load_state_dict(torch.load(folder / "model.pt"))


def by_assignment(model, other, folder):
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def by_accelerate(model, other, folder):
    Accelerator(cpu=True).save_model(model, str(folder))
    load_checkpoint_in_model(other, str(folder))


def by_accelerate_in_shards(model, other, folder):
    Accelerator(cpu=True).save_model(model, str(folder), max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    load_checkpoint_in_model(other, str(folder))


WAYS = [
    by_safetensors,
    by_the_hub,
    by_torch,
    by_assignment,
    by_accelerate,
    by_accelerate_in_shards,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_model_is_saved_and_loaded(pair, way, tmp_path):
    model, other, base = pair
    way(model, other, tmp_path)
    check(other, model, base)


def test_accelerates_state_is_saved_and_loaded(tmp_path):
    base = tiny_llama().eval()
    saving, loading = Accelerator(cpu=True), Accelerator(cpu=True)
    model, optimizer = attach(copy.deepcopy(base)), None
    model, optimizer = saving.prepare(model, adam(model))
    train(model, optimizer)
    saving.save_state(str(tmp_path))
    other = attach(copy.deepcopy(base))
    other, other_optimizer = loading.prepare(other, adam(other))
    loading.load_state(str(tmp_path))
    assert far(model(IDS).logits, other(IDS).logits) == 0.0
    for one, two in ((model, optimizer), (other, other_optimizer)):
        train(one, two, draws=1)
    assert far(model(IDS).logits, other(IDS).logits) < 1e-3


def split(state, count, how):
    """A state dict in parts: by layers, by kinds of tensors, or at random."""
    keys = list(state)
    if how == "kinds":
        keys.sort(key=lambda key: key[::-1])
    if how == "random":
        keys = [keys[i] for i in torch.randperm(len(keys))]
    size = -(-len(keys) // count)
    return [{key: state[key] for key in keys[i : i + size]} for i in range(0, len(keys), size)]


@pytest.mark.parametrize("how", ["order", "kinds", "random"])
@pytest.mark.parametrize("saved", ["active", "disabled", "merged"])
@pytest.mark.parametrize("loaded", ["active", "disabled"])
def test_shards_in_any_order_give_the_same_model(pair, how, saved, loaded):
    model, other, base = pair
    if saved == "disabled":
        model.base_model.disable_adapter_layers()
    elif saved == "merged":
        model.merge_adapter()
    state = copy.deepcopy(model.state_dict())
    if saved == "disabled":
        model.base_model.enable_adapter_layers()
    elif saved == "merged":
        model.unmerge_adapter()
    if loaded == "disabled":
        other.base_model.disable_adapter_layers()
    parts = split(state, int(torch.randint(2, 9, ())), how)
    for i in torch.randperm(len(parts)):
        other.load_state_dict(parts[i], strict=False)
    other.base_model.enable_adapter_layers()
    if saved == loaded == "active":
        check(other, model, base)
    else:  # the weight in memory was rounded another time
        eps = 6e-2 if base.dtype == torch.bfloat16 else 1e-5
        expected = model(IDS).logits
        assert far(other(IDS).logits, expected) <= eps * float(expected.abs().max())


def test_shards_by_different_loaders_give_the_same_model_or_an_error(pair, tmp_path):
    model, other, _ = pair
    Accelerator(cpu=True).save_model(model, str(tmp_path), max_shard_size="6KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    try:
        for i, file in enumerate(files):
            if i % 3 == 0:
                load_checkpoint_in_model(other, str(file), device_map={"": "cpu"})
            elif i % 3 == 1:
                load_checkpoint_in_model(other, str(file))
            else:
                load_model(other, str(file), strict=False)
        found = other(IDS).logits
    except (ValueError, NotImplementedError):
        return
    assert far(found, model(IDS).logits) == 0.0


@pytest.mark.parametrize(
    "part", ["rosa_A", "rosa_B", "rosa_offset.default.A", "rosa_offset.default.draws", "rosa_[AB]"]
)
@pytest.mark.parametrize("only", [True, False])
def test_factors_without_their_offset_are_refused_at_the_next_use(part, only):
    model, other = attach(tiny_llama()), attach(tiny_llama(), seed=5)
    state = copy.deepcopy(model.state_dict())
    names = ["rosa_A", "rosa_B"] if part == "rosa_[AB]" else [part]
    of_part = {k: v for k, v in state.items() if any(name in k for name in names)}
    rest = {k: v for k, v in state.items() if k not in of_part}
    first, then = (of_part, rest) if only else (rest, of_part)
    other.load_state_dict(first, strict=False)
    for use in (
        lambda: other(IDS),
        lambda: resample(other),
        lambda: other.merge_adapter(),
        lambda: next(rosa_layers(other))[1].whole_change("default"),
    ):
        with pytest.raises(ValueError, match=r"and no more of adapter 'default'"):
            use()
    other.load_state_dict(then, strict=False)  # and nothing is lost
    assert far(other.eval()(IDS).logits, model.eval()(IDS).logits) == 0.0


def test_the_base_weights_alone_can_be_loaded():
    model, other = attach(tiny_llama()), tiny_llama()
    with model.disable_adapter():
        state = {k: v.clone() for k, v in model.state_dict().items() if "rosa_" not in k}
    changed = {k: v + 0.1 if k.endswith("base_layer.weight") else v for k, v in state.items()}
    plain = {
        k.removeprefix("base_model.model.").replace("base_layer.", ""): v
        for k, v in changed.items()
    }
    other.load_state_dict(plain)
    model.load_state_dict(changed, strict=False)
    with model.disable_adapter():
        assert far(model(IDS).logits, other(IDS).logits) < 1e-5


def test_a_state_dict_as_earlier_versions_wrote_it_still_loads():
    """The weight as it lay in memory, in half precision too, and marks of what is in it."""
    base = tiny_llama().eval()
    model, other = attach(copy.deepcopy(base)), attach(copy.deepcopy(base), seed=5)
    train(model, adam(model))
    model.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, layer in rosa_layers(model):
        state[f"{name}.base_layer.weight"] = layer.base_layer.weight.detach().clone()
        state[f"{name}.rosa_offset.default.in_weight"] = torch.tensor(1)
    other.load_state_dict(state)
    check(other, model, base)


# -- copies and casts ----------------------------------------------------------------------------


def deep(model):
    return copy.deepcopy(model)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_state_dict(model):
    other = attach(copy.deepcopy(model).unload(), seed=9)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


def of_a_copy(model):
    return copy.deepcopy(copy.deepcopy(model))


@pytest.mark.parametrize("make", [deep, pickled, through_a_state_dict, of_a_copy])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_in_half_precision_keeps_the_exact_base(make, dtype, merged):
    base = tiny_llama().to(dtype)
    model = attach(copy.deepcopy(base))
    train(model, adam(model))
    if merged:
        model.merge_adapter()
    made = make(model)
    expected = model.eval()(IDS).logits
    eps = 6e-2 * float(expected.abs().max()) if merged else 0.0  # maybe not merged any more
    assert far(made.eval()(IDS).logits, expected) <= eps
    plain = made.unload().state_dict()
    assert all(torch.equal(plain[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("state", ["active", "merged", "disabled", "two"])
def test_a_cast_after_attaching_is_of_the_pretrained_weight(before, after, state):
    base = tiny_llama().to(before).eval()
    model = attach(copy.deepcopy(base))
    train(model, adam(model))
    model.eval()
    expected = model(IDS).logits.double()
    if state == "two":
        model.add_adapter("other", RosaConfig(r=1, target_modules=["q_proj", "down_proj"]))
    elif state == "merged":
        model.merge_adapter()
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    model.to(after)
    coarsest = max((before, after), key=lambda dtype: torch.finfo(dtype).eps)
    eps = 40 * torch.finfo(coarsest).eps * float(expected.abs().max())
    if state != "disabled":
        assert far(model(IDS).logits.double(), expected) <= eps
    if state == "merged":
        model.unmerge_adapter()
    model.base_model.enable_adapter_layers()
    for _ in range(2):
        assert far(model(IDS).logits.double(), expected) <= eps
        resample(model)
    model.merge_adapter()
    assert far(model(IDS).logits.double(), expected) <= eps
    plain, wanted = model.unload().state_dict(), base.to(after).state_dict()
    for name, value in wanted.items():
        # W_0 comes back to the rounding of float32, which another rounding can turn over.
        half = after in (torch.float16, torch.bfloat16)
        assert not half or int((plain[name] != value).sum()) <= 3
        torch.testing.assert_close(plain[name], value, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("verb", ["merge", "unmerge", "disable", "switch", "resample"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_failure_inside_a_change_of_weights_leaves_the_layer_as_it_was(verb, number, monkeypatch):
    dtype = [torch.float32, torch.bfloat16][int(torch.randint(2, ()))]
    base = tiny_llama().to(dtype).eval()
    model = attach(copy.deepcopy(base))
    model.add_adapter("other", RosaConfig(r=2, target_modules="all-linear", seed=4))
    train(model, adam(model))
    model.eval()
    expected = model(IDS).logits
    if verb == "unmerge":
        model.merge_adapter()
    verbs = {
        "merge": model.merge_adapter,
        "unmerge": model.unmerge_adapter,
        "disable": model.base_model.disable_adapter_layers,
        "switch": lambda: model.set_adapter("other"),
        "resample": lambda: resample(model),
    }
    calls, original = [], LowRank.to

    def fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LowRank, "to", fails)
    with contextlib.suppress(RuntimeError):  # in half precision, disabling needs no product
        verbs[verb]()
        assert verb == "disable"
    monkeypatch.setattr(LowRank, "to", original)
    for layer in (layer for _, layer in rosa_layers(model)):
        if layer.merged:
            layer.unmerge()
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    eps = 6e-2 if dtype == torch.bfloat16 else 1e-5
    assert far(model(IDS).logits, expected) <= eps * float(expected.abs().max())
    plain = model.unload().state_dict()
    for name, value in base.state_dict().items():
        torch.testing.assert_close(plain[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("peft", [False, True])
def test_a_state_dict_of_live_factors_is_refused_after_a_draw(peft, tmp_path):
    """It would be new factors with an old offset; a copy is what people mean."""
    model: Any = get_peft_model(Mlp(), RosaConfig(r=2, target_modules=["first", "last"]))
    x = torch.randn(4, 7).double()
    take = get_peft_model_state_dict if peft else (lambda m: m.state_dict())

    def give(state):
        (set_peft_model_state_dict if peft else nn.Module.load_state_dict)(model, state)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    live, kept, best = take(model), copy.deepcopy(take(model)), model(x)
    whole = model.state_dict()
    give(live)  # of now: nothing changes
    torch.testing.assert_close(model(x), best)
    resample(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    now = model(x)
    with pytest.raises(ValueError, match=r"taken before a draw.*deepcopy"):
        give(live)
    with pytest.raises(ValueError, match=r"taken before a draw.*deepcopy"):
        model.save_pretrained(tmp_path, state_dict=whole)
    assert not list(tmp_path.glob("*.safetensors"))
    torch.testing.assert_close(model(x), now)
    give(kept)
    torch.testing.assert_close(model(x), best)


def test_a_state_dict_of_live_factors_is_refused_after_another_file(tmp_path):
    """Of as many draws."""
    config = {"r": 2, "target_modules": ["first", "last"]}
    base = Mlp()
    get_peft_model(copy.deepcopy(base), RosaConfig(seed=5, **config)).save_pretrained(
        tmp_path / "a"
    )
    model: Any = get_peft_model(base, RosaConfig(seed=7, **config))
    live = model.state_dict()
    loaded = load_file(tmp_path / "a" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, loaded)
    with pytest.raises(ValueError, match=r"the loading of a file.*deepcopy"):
        model.save_pretrained(tmp_path / "b", state_dict=live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_may_be_written_into(dtype):
    """As loaders do that fill what they are given: it holds no offset of the model's own."""
    model: Any = get_peft_model(Mlp().to(dtype), RosaConfig(r=2, target_modules=["first", "last"]))
    resample(model)
    x = torch.randn(4, 7, dtype=dtype)
    with torch.no_grad():
        with model.disable_adapter():
            pretrained = model(x)
        before = model(x)
        for state in (model.state_dict(), get_peft_model_state_dict(model)):
            for name, value in state.items():
                if "rosa_offset" in name:
                    value.mul_(0)
        torch.testing.assert_close(model(x), before)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), pretrained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", ["A", "B"])
def test_without_what_is_frozen_a_state_dict_is_still_whole(trained, dtype):
    """As DeepSpeed's checkpoints are: what is frozen is the base, and the factor that stays."""
    base = tiny_llama().to(dtype).eval()
    model = attach(copy.deepcopy(base), trained=trained)
    other = attach(copy.deepcopy(base), trained=trained, seed=5)
    train(model, adam(model))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state_dict = {k: v for k, v in copy.deepcopy(model.state_dict()).items() if k not in frozen}
    other.load_state_dict(state_dict, strict=False)
    expected = model(IDS).logits
    assert far(other(IDS).logits, expected) <= 1e-5 * float(expected.abs().max())


def test_without_what_is_frozen_and_not_known_it_is_refused():
    base = tiny_llama().eval()
    how = {"trained": "B", "directions": "zero"}
    model, other = attach(copy.deepcopy(base), **how), attach(copy.deepcopy(base), **how, seed=5)
    train(model, adam(model))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state_dict = {k: v for k, v in copy.deepcopy(model.state_dict()).items() if k not in frozen}
    other.load_state_dict(state_dict, strict=False)
    with pytest.raises(ValueError, match="and no more of adapter 'default'"):
        other(IDS)
