"""Weights that no process holds whole are refused at the start, in a real process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import TrainerControl, TrainerState, TrainingArguments

from rosa import RosaCallback, RosaConfig, resample, watch
from rosa.layers.in_model import rosa_layers
from tests.models import Mlp, tiny_bert

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(),
    reason="torch was built without gloo",
)
CONFIG = RosaConfig(
    r=2, directions="orthonormal", target_modules=["query", "dense", "word_embeddings"]
)


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone: shards of one, which are DTensors all the same."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def embeddings_in_tensor_parallel(model, mesh):
    plan = {"bert.embeddings.word_embeddings": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, mesh, plan)


def cut_twice(model, mesh):
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    linear = model.get_submodule("bert.encoder.layer.1.attention.self.query")
    linear.weight = nn.Parameter(
        distribute_tensor(linear.weight.detach(), both, [Shard(0), Shard(1)])
    )
    return model


def replicated(model, mesh):
    linear = model.get_submodule("bert.encoder.layer.1.attention.self.query")
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Replicate()]))
    return model


SHARDED = [embeddings_in_tensor_parallel, cut_twice, replicated]
MESSAGE = "sharded over processes"


@pytest.mark.parametrize("shard", SHARDED)
def test_a_model_that_was_sharded_in_other_ways_gets_no_adapter(shard, mesh):
    model = shard(tiny_bert(), mesh)
    with pytest.raises(ValueError, match=MESSAGE):
        get_peft_model(model, CONFIG)
    assert not list(rosa_layers(model))


def by_fsdp_1(model, mesh):
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    wrapped.sharding_strategy = ShardingStrategy.FULL_SHARD  # a group of one has no need of it
    return wrapped


@pytest.mark.parametrize("trains_first", [False, True])
def test_a_weight_that_fsdp_1_hides_is_refused_in_a_pass(trains_first, mesh):
    """It stands before the parameter in the module, which would not see the changed one."""
    model: Any = Attending().eval()
    model = get_peft_model(model, RosaConfig(r=2, target_modules=["attention"]))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    x = torch.randn(3, 4, 6)
    with torch.set_grad_enabled(trains_first), pytest.raises(ValueError, match="FSDP 1 puts one"):
        wrapped(x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def adapted_layers_in_tensor_parallel(model, mesh):
    for layer in model.get_submodule("base_model.model.bert.encoder.layer"):
        plan = {"attention.self.query.base_layer": ColwiseParallel()}
        parallelize_module(layer, mesh, plan)
    return model


@pytest.mark.parametrize("shard", [by_fsdp_1, adapted_layers_in_tensor_parallel])
def test_a_model_sharded_with_its_adapter_is_refused_at_the_start(shard, mesh, tmp_path):
    model = get_peft_model(tiny_bert(), CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    refuses(shard(model, mesh), optimizer, tmp_path)


@pytest.mark.parametrize("what", ["weight", "factor"])
def test_a_single_sharded_tensor_is_refused(what, mesh, tmp_path):
    model = get_peft_model(tiny_bert(), CONFIG)
    *_, (_, layer) = rosa_layers(model)
    places = {"weight": (layer.get_base_layer(), "weight"), "factor": (layer.rosa_B, "default")}
    owner, name = places[what]
    whole = getattr(owner, name).detach()
    setattr(owner, name, nn.Parameter(distribute_tensor(whole, mesh, [Replicate()])))
    refuses(model, torch.optim.AdamW(model.parameters()), tmp_path)


def refuses(model, optimizer, folder):
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
    state = TrainerState(max_steps=100)
    for call in (
        lambda: watch(model),
        lambda: resample(model),
        lambda: resample(model, optimizer),
        lambda: RosaCallback().on_train_begin(
            arguments, state, TrainerControl(), model=model, optimizer=optimizer
        ),
    ):
        with pytest.raises(ValueError, match=MESSAGE):
            call()
    assert all(layer.adapters["default"].draws == 1 for _, layer in rosa_layers(model))


@pytest.mark.parametrize("as_buckets", [False, True])
@pytest.mark.parametrize("moments", ["clear", "keep"])
def test_sharded_moments_of_whole_factors_are_cleared(moments, as_buckets, mesh):
    config = RosaConfig(r=2, directions="orthonormal", target_modules=["first", "last"])
    model = get_peft_model(Mlp(torch.float32), config)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(
        factors, torch.optim.AdamW, parameters_as_bucket_view=as_buckets, lr=1e-2
    )

    def step():
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert len(optimizer.optim.state) == 4
    before = [v["exp_avg"].clone() for v in optimizer.optim.state.values()]
    resample(model, optimizer, moments=moments)
    after = [v["exp_avg"] for v in optimizer.optim.state.values()]
    assert len(after) == (0 if moments == "clear" else 4)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))
    step()
    assert all(int(v["step"]) == (1 if after == [] else 2) for v in optimizer.optim.state.values())
    optimizer.consolidate_state_dict()  # keeps a copy of the moments in the optimizer
    resample(model, optimizer)
    assert not optimizer.optim.state
