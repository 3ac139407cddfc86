"""Models whose weights `fully_shard` (FSDP 2) has spread over processes: as in one process."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rosa
from rosa import RosaConfig, resample, watch
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.sharding import own_part, reshard
from tests.processes import all_equal, fsdp_on_cpus, in_processes, without_gloo
from tests.targets import KINDS, inputs_of, outputs

pytestmark = without_gloo


def adapted(kind, dtype=torch.float64, cut=lambda base: None, **options):
    """A model that is the same in every process; its base is cut first where that is asked for."""
    torch.manual_seed(0)
    base, targets = KINDS[kind]()
    base = base.to(dtype).eval()
    cut(base)
    torch.manual_seed(1)
    return get_peft_model(base, RosaConfig(r=2, **targets, **options))


def loss_of(model, x):
    return outputs(model, x).float().square().mean()


def shard(model, size, blocks):
    """Each block by itself, and the rest of the model."""
    mesh = init_device_mesh("cpu", (size,))
    wanted = ("BertLayer", "GPT2Block", "MixtralDecoderLayer")
    for module in [m for m in model.modules() if type(m).__name__ in wanted] if blocks else []:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, optimizer, parts, draws):
    """The losses of this process's parts of some batches, with draws in between."""
    losses = []
    for step, x in enumerate(parts):
        if step == 1:
            watch(model)
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step in draws:
            resample(model, optimizer)
    return torch.stack(losses)


def factors(model):
    return [p for p in model.parameters() if p.requires_grad]


def as_in_one_process(rank, size, folder, kind, dtype, blocks, options, first):
    one = adapted(kind, dtype, **options)
    pretrained = copy.deepcopy(one).unload()
    cut = partial(shard, size=size, blocks=blocks)
    if first:
        model = adapted(kind, dtype, cut, **options)
    else:
        cut(model := adapted(kind, dtype, **options))
    kinds = [torch.optim.AdamW(factors(m), lr=1e-2, weight_decay=0.0) for m in (one, model)]
    batches = [inputs_of(kind, dtype) for _ in range(6)]
    expected = train(one, kinds[0], batches, (2, 4))
    found = train(model, kinds[1], [x.chunk(size)[rank] for x in batches], (2, 4))
    distributed.all_reduce(found)
    exact = dtype == torch.float64
    near = {"rtol": 1e-6, "atol": 1e-7} if exact else {"rtol": 2e-2, "atol": 2e-2}
    # In half precision a gradient's rounding, which the size of a batch decides, is in every step.
    trained = near if exact else {"rtol": 0.2, "atol": 0.1}
    torch.testing.assert_close(found / size, expected, **trained)
    x = batches[0]

    def give(*models):
        with torch.no_grad():
            return [outputs(one, x) for one in models]

    before, wanted = give(model, one)
    torch.testing.assert_close(before, wanted, **trained)
    with model.disable_adapter():
        torch.testing.assert_close(*give(model, pretrained), **near)
    torch.testing.assert_close(*give(model), before, rtol=0, atol=1e-12 if exact else 0)
    model.merge_adapter()
    torch.testing.assert_close(*give(model), before, **near)
    model.unmerge_adapter()
    torch.testing.assert_close(*give(model), before, **near)
    wanted, got = map(get_peft_model_state_dict, (one, model))
    assert wanted.keys() == got.keys()
    for key, value in got.items():
        if exact:
            torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6, msg=key)
        assert all_equal(value.float())
    model.save_pretrained(folder / str(rank))
    loaded = PeftModel.from_pretrained(pretrained, str(folder / str(rank)))
    torch.testing.assert_close(*give(model, loaded), **near)
    reshard(model)
    for _, layer in rosa_layers(model):  # nobody holds more than his rows
        assert layer.base_weight.memory.shape[0] < layer.base_weight.parameter.shape[0] or size == 1


@pytest.mark.parametrize("first", ["adapted", "cut"])
@pytest.mark.parametrize(
    ("kind", "size", "dtype", "blocks", "options"),
    [
        ("bert", 2, torch.float64, True, {"directions": "gradient"}),
        ("bert", 3, torch.float64, False, {"directions": "svd"}),
        ("bert", 2, torch.bfloat16, True, {"directions": "orthonormal"}),
        ("gpt2", 3, torch.float64, True, {"directions": "gradient", "trained": "B"}),
        ("gpt2", 2, torch.float64, False, {"directions": "orthonormal", "trained": "A"}),
        ("gpt2", 2, torch.float16, True, {"directions": "svd"}),
        ("pictures", 2, torch.float64, False, {"directions": "gradient"}),
        ("pictures", 3, torch.float64, False, {"directions": "zero"}),
        ("experts", 2, torch.float64, True, {"directions": "gradient"}),
        ("experts", 2, torch.float64, False, {"directions": "svd"}),
    ],
)
def test_it_is_trained_as_in_one_process(tmp_path, kind, size, dtype, blocks, options, first):
    how = size, tmp_path, kind, dtype, blocks, options, first == "cut"
    in_processes(size, tmp_path, as_in_one_process, *how)


def guard(rank, size):
    model = adapted("bert", directions="orthonormal")
    shard(model, size, blocks=True)
    optimizer, x = torch.optim.AdamW(factors(model), lr=1e-2), inputs_of("bert", None)
    loss_of(model, x).backward()  # the step before
    optimizer.step()
    optimizer.zero_grad()

    # A reference's pass between the policy's two: its weights are back when they are needed.
    loss_of(model, x).backward()
    expected = [p.grad.full_tensor() for p in factors(model)]
    optimizer.zero_grad()
    loss = loss_of(model, x)
    with model.disable_adapter(), torch.no_grad():
        model(x)
    loss.backward()
    for parameter, wanted in zip(factors(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted)
    optimizer.zero_grad()

    # A draw there is found out, though torch gathers the weight anew.
    loss = loss_of(model, x)
    resample(model)
    with pytest.raises(RuntimeError, match="drawn again before the backward pass"):
        loss.backward()
    model.reshard()
    optimizer.zero_grad()

    # The gradient can be shown to a draw too, and NaN in anybody's rows is everybody's.
    model.peft_config["default"].directions = "gradient"
    before = outputs(model, x).detach()
    assert resample(model, optimizer, batches=[x], loss=loss_of) == len(list(rosa_layers(model)))
    torch.testing.assert_close(outputs(model, x), before)
    model.reshard()
    _, layer = next(rosa_layers(model))
    kept = layer.rosa_B["default"].to_local().detach().clone()
    if rank == 1:
        own_part(layer.rosa_B["default"]).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        resample(model, optimizer)
    own_part(layer.rosa_B["default"]).data.copy_(kept)

    # What is whole for a pass is not written into, nor is more attached or exported.
    with torch.no_grad():
        model(x)
    pooler = model.get_submodule("base_model.model.bert.pooler.dense")
    with pytest.raises(ValueError, match=r"call reshard\(\)"):
        pooler.enable_adapters(False)
    assert not pooler.disable_adapters
    for call in (
        lambda: model.add_adapter("second", RosaConfig(r=2, target_modules=["query"])),
        lambda: rosa.export_lora(model, "nowhere"),
        lambda: rosa.export_merged(model, "nowhere"),
        lambda: rosa.map_pretrained(model, "nowhere"),
    ):
        with pytest.raises(ValueError, match="is sharded over processes"):
            call()
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading"):
        adapted("bert").to("meta")

    # Nor do the processes draw other adapters of a model that they share.
    model = adapted("bert", directions="orthonormal")
    model.add_adapter("second", RosaConfig(r=2, target_modules=["query"]))
    shard(model, size, blocks=True)
    if rank == 1:
        model.set_adapter("second")
    with pytest.raises(ValueError, match="make the same ones active in all"):
        resample(model)

    # A module that is sharded by itself is not whole yet when its adapter asks for its weight.
    model = adapted("pictures", directions="orthonormal")
    fully_shard(
        model.base_model.model.attention.get_base_layer(), mesh=init_device_mesh("cpu", (2,))
    )
    with pytest.raises(ValueError, match="call fully_shard on a module that holds it"):
        model(inputs_of("pictures", torch.float64))


def test_what_would_go_wrong_is_told(tmp_path):
    in_processes(2, tmp_path, guard, 2)


class Scored(nn.Module):
    """With a head of one row, which one process alone holds."""

    def __init__(self):
        super().__init__()
        self.first, self.score = nn.Linear(6, 7), nn.Linear(7, 1)

    def forward(self, x):
        return self.score(self.first(x).tanh())


def writes(rank, size, dtype):
    """What others write is found out in rows as in a whole weight; one process has none of one."""

    def scored():
        torch.manual_seed(0)
        config = RosaConfig(r=1, directions="orthonormal", target_modules=["first", "score"])
        return get_peft_model(Scored().to(dtype), config)

    one, model = scored(), scored()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    x = torch.randn(4, 6, dtype=dtype)
    near = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}

    def same():
        with torch.no_grad():
            torch.testing.assert_close(model(x), one(x), **near)
        model.reshard()  # else an optimizer would be made of whole weights

    def weights(each):
        return [m.get_base_layer().weight for _, m in rosa_layers(each)]

    for each in (one, model):  # inside disable_adapter they are a part of the pretrained weight
        resample(each)
        with each.disable_adapter(), torch.no_grad():
            for weight in weights(each):
                weight.mul_(3)
    same()
    for each in (one, model):
        resample(each)
    same()
    norms = [[m.base_weight.norm for _, m in rosa_layers(each)] for each in (one, model)]
    torch.testing.assert_close(*norms, rtol=1e-3, atol=0)
    for each in (one, model) if dtype == torch.float64 else ():  # a base weight that is trained
        for weight in weights(each):
            weight.requires_grad_(True)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        resample(each)
    same()
    for each in (one, model):
        for weight in weights(each):
            weight.requires_grad_(False)
        with torch.no_grad():
            weights(each)[0].mul_(2)
        with pytest.raises(ValueError, match="was changed while ROSA's offset stood in it"):
            resample(each)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_others_write_is_found_out(tmp_path, dtype):
    in_processes(2, tmp_path, writes, 2, dtype)


def switched_after_a_pass(rank, size):
    """Deleting and unloading, with the outermost weights whole from a pass before."""
    one, model = adapted("bert"), adapted("bert")
    for each in (one, model):
        each.add_adapter("second", RosaConfig(r=2, target_modules=["query", "dense"], seed=1))
    pretrained = copy.deepcopy(one).unload()
    base = model.get_base_model()
    shard(base, size, blocks=True)
    x = inputs_of("bert", None)
    with torch.no_grad():
        for each in (one, model):
            outputs(each, x)
            each.delete_adapter("second")
        torch.testing.assert_close(outputs(model, x), outputs(one, x))
        plain = model.unload()
        torch.testing.assert_close(outputs(plain, x), outputs(pretrained, x))


def test_adapters_leave_after_a_pass(tmp_path):
    in_processes(2, tmp_path, switched_after_a_pass, 2)


def by_accelerate(rank, folder, kind):
    """As `accelerate launch` with `fsdp_version: 2` sets it up, which it does on no CPU."""
    fsdp_on_cpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        state_dict_type=kind,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = adapted("bert", directions="gradient")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(factors(model), lr=1e-2))
    parts = [inputs_of("bert", None).chunk(2)[rank] for _ in range(5)]
    train(model, optimizer, parts, (2, 3))
    weights = accelerator.get_state_dict(model)
    accelerator.save_state(folder / "state")
    if rank == 0:
        accelerator.unwrap_model(model).save_pretrained(folder / "adapter", state_dict=weights)
    accelerator.wait_for_everyone()
    if kind == "FULL_STATE_DICT":
        expected = outputs(model, parts[0])
        model.reshard()
        train(model, optimizer, parts, (1, 4))
        accelerator.load_state(folder / "state")
        torch.testing.assert_close(outputs(model, parts[0]), expected)
    loaded = PeftModel.from_pretrained(adapted("bert").unload(), str(folder / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, parts[0]), outputs(loaded, parts[0]))
    pretrained = adapted("bert").unload().bert.embeddings.word_embeddings.weight
    embeddings = loaded.get_input_embeddings().get_base_layer().weight
    with loaded.disable_adapter():
        torch.testing.assert_close(embeddings, pretrained)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_accelerate_trains_and_saves_it(tmp_path, kind):
    in_processes(2, tmp_path, by_accelerate, tmp_path, kind)
