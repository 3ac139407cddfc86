"""Models whose linear layers tensor parallelism has cut: trained as in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import ParallelismConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

import rosa
from rosa import RosaCallback, RosaConfig, resample, watch
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.sharding import own_part
from tests.processes import all_equal, in_processes, without_gloo

pytestmark = without_gloo

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=6, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=6, head_dim=4),
    "gpt_neox": GPTNeoXConfig(**SIZES, use_parallel_residual=False),
}


class Layers(nn.Module):
    """Layers that are called with tensors of any layout.

    Args:
        inner: width, which need not divide by the processes.
    """

    def __init__(self, inner):
        super().__init__()
        self.first = nn.Linear(7, inner)
        self.second = nn.Linear(inner, 5, bias=False)
        self.third = nn.Linear(5, 8)

    def forward(self, x):
        return self.third(self.second(F.silu(self.first(x))))


PLANS = {
    "local": {"first": ColwiseParallel(), "second": RowwiseParallel()},
    "gathered": {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "second": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "third": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    },
    "distributed": {
        "first": ColwiseParallel(use_local_output=False),
        "second": RowwiseParallel(use_local_output=False),
        "third": ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    },
}


def decoder(folder, dtype, size=1):
    """A model of a folder; over several processes as its class plans it."""
    how = {"distributed_config": DistributedConfig(tp_size=size)} if size > 1 else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


@torch.no_grad()
def in_float(model, x):
    out = model(x)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


def train(model, batches, draws, optimizer=None, **options):
    """The losses of some batches, with draws in between."""
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.1)
    losses = []
    for step, x in enumerate(batches):
        if step == 1:
            watch(model)
        out = model(x)
        out = out if isinstance(out, torch.Tensor) else out.logits
        loss = out.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step in draws:
            resample(model, optimizer, **options)
    return torch.stack(losses)


def changes(model):
    """Each layer's whole change, which all processes ask for."""
    return [layer.whole_change("default").dense() for _, layer in rosa_layers(model)]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def as_in_one(rank, folder, name, options, draws):
    size = distributed.get_world_size()
    config = {"r": 3, "target_modules": "all-linear", **options}
    batches = torch.randint(50, (6, 4, 7), generator=torch.Generator().manual_seed(5))
    models, losses = [], []
    for processes in (1, size):
        torch.manual_seed(1)
        base = decoder(folder / name, torch.float64, processes)
        models.append(model := get_peft_model(base, RosaConfig(**config)))
        torch.manual_seed(2)
        moments = "keep" if options.get("trained") == "A" else "clear"
        losses.append(train(model, batches, draws, moments=moments))
    alone, cut = models
    same([losses[1]], [losses[0]])
    same(changes(cut), changes(alone))
    assert all(all_equal(change) for change in changes(cut))
    for _, layer in rosa_layers(cut):
        placements = [p.placements[0] for p in (layer.rosa_A["default"], layer.rosa_B["default"])]
        assert sum(p.is_shard() for p in placements) == 1  # as the weight, not in every process

    x = batches[0]
    with torch.no_grad():
        out = in_float(alone, x)
        torch.testing.assert_close(in_float(cut, x), out)
        with alone.disable_adapter(), cut.disable_adapter():
            torch.testing.assert_close(in_float(cut, x), in_float(alone, x))
        cut.merge_adapter()
        torch.testing.assert_close(in_float(cut, x), out)
        cut.unmerge_adapter()
        torch.testing.assert_close(in_float(cut, x), out)

        adapter = folder / f"adapter-{name}"
        cut.save_pretrained(adapter, is_main_process=rank == 0)
        distributed.barrier()
        for low in (False, True):
            base = decoder(folder / name, torch.float64, size)
            loaded = PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low).eval()
            torch.testing.assert_close(in_float(loaded, x), out)
        whole = PeftModel.from_pretrained(decoder(folder / name, torch.float64), adapter).eval()
        torch.testing.assert_close(in_float(whole, x), out)

        loaded.merge_and_unload().save_pretrained(
            folder / f"merged-{name}", is_main_process=not rank
        )
        distributed.barrier()
        torch.testing.assert_close(in_float(decoder(folder / f"merged-{name}", None), x), out)


def save(folder, name):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(MODELS[name]).save_pretrained(folder / name)


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_what_one_process_trains(name, tmp_path):
    save(tmp_path, name)
    some = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "lm_head"]  # its plan gathers
    options = {"target_modules": "all-linear" if name == "gpt_neox" else some}
    in_processes(2, tmp_path, as_in_one, tmp_path, name, options, (2, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"directions": "svd"},
        {"directions": "orthonormal", "alpha": 12},
        {"directions": "zero"},
        {"trained": "B"},
        {"trained": "A"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_each_kind_of_draw_in_three_processes(options, tmp_path):
    save(tmp_path, "llama")
    in_processes(3, tmp_path, as_in_one, tmp_path, "llama", options, (2,))


def by_torch(rank, plan):
    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(1)
    base = Layers(12 if plan == "local" else 11).double()  # torch's own takes no other there
    config = {"r": 2, "target_modules": [*PLANS[plan]]}
    alone = get_peft_model(copy.deepcopy(base), RosaConfig(**config))
    adapted = get_peft_model(parallelize_module(base, mesh, PLANS[plan]), RosaConfig(**config))
    batches = torch.randn(5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    same([train(adapted, batches, (2,))], [train(alone, batches, (2,))])
    same(changes(adapted), changes(alone))


@pytest.mark.parametrize("plan", PLANS)
def test_layouts_and_uneven_shards_of_torch(plan, tmp_path):
    in_processes(3, tmp_path, by_torch, plan)


def out_of_memory(weight):
    put = type(weight).put

    def fails(self, *args):
        if self is weight:
            raise torch.OutOfMemoryError("no memory")
        put(self, *args)

    return fails


def verbs(rank, folder):
    size = distributed.get_world_size()
    x = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(5))
    config = RosaConfig(r=3, target_modules="all-linear")

    def adapted(dtype):
        return get_peft_model(decoder(folder / "llama", dtype, size), config)

    model = adapted(torch.bfloat16)
    before = [own_part(weight) for weight in adapted(torch.bfloat16).unload().parameters()]
    train(model, [x] * 3, (1,))
    first = in_float(model, x)
    model.add_adapter("second", RosaConfig(r=2, target_modules=["o_proj", "up_proj"]))
    model.set_adapter("second")
    train(model, [x] * 3, (1,))
    second = in_float(model, x)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(in_float(model, x), first)
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(in_float(model, x), first, rtol=0.1, atol=0.1)
    model.set_adapter("second")
    model.delete_adapter("sum")
    model.delete_adapter("default")
    assert torch.equal(in_float(model, x), second)
    after = [own_part(weight) for weight in model.unload().parameters()]
    assert all(map(torch.equal, after, before))  # to the last bit, in half precision

    model = adapted(torch.float32)
    train(model, [x] * 3, (1,))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    out = in_float(model, x)
    other = adapted(torch.float32)
    other.load_state_dict(state)
    assert torch.equal(in_float(other, x), out)
    batches = [{"input_ids": x, "labels": x}]
    model.merge_adapter()
    if rank == 0:  # an error in one process alone: the way back asks nothing of the other
        (_, layer), *_ = reversed(list(rosa_layers(model)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(layer.base_weight), "put", out_of_memory(layer.base_weight))
            with pytest.raises(torch.OutOfMemoryError):
                model.unmerge_adapter()
    torch.testing.assert_close(in_float(model, x), out, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    resample(model, batches=batches)
    torch.testing.assert_close(in_float(model, x), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_float(model.to(torch.float64), x), out, rtol=1e-4, atol=1e-4)


def test_the_verbs(tmp_path):
    save(tmp_path, "llama")
    in_processes(2, tmp_path, verbs, tmp_path)


def refused(rank, folder):
    size = distributed.get_world_size()
    x = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(5))
    base = decoder(folder / "llama", torch.float64, size)
    with pytest.raises(ValueError, match="linear layers, cut once"):
        get_peft_model(base, RosaConfig(target_modules=["q_proj", "embed_tokens"]))
    assert not list(rosa_layers(base))
    model = get_peft_model(base, RosaConfig(r=2, target_modules="all-linear"))
    for export in (rosa.export_merged, rosa.export_lora, rosa.export_rosa):
        with pytest.raises(ValueError, match="tensor parallelism"):
            export(model, folder / "export")
    assert not (folder / "export").exists()
    with pytest.raises(ValueError, match="tensor parallelism"):
        rosa.map_pretrained(model, folder / "llama")
    (_, layer), *_ = rosa_layers(model)
    with pytest.raises(ValueError, match="leave the layer out"):
        layer.weight + 1

    train(model, [x] * 2, (1,))
    loss = model(x).logits.square().mean()
    resample(model)
    with pytest.raises(RuntimeError, match="before the backward pass"):
        loss.backward()  # of weights that are no more
    with torch.no_grad():
        layer.base_layer.weight.add_(1)  # while an offset stands in it
    with pytest.raises(ValueError, match="was changed while"):
        model(x)


def test_what_would_be_wrong_is_refused(tmp_path):
    save(tmp_path, "llama")
    in_processes(2, tmp_path, refused, tmp_path)


def drifting_apart(rank, folder):
    base = decoder(folder / "llama", torch.float64, distributed.get_world_size())
    model = get_peft_model(base, RosaConfig(r=2, target_modules="all-linear"))
    (_, layer), *_ = rosa_layers(model)
    with torch.no_grad():
        own_part(layer.rosa_A["default"]).add_(rank)
    before = own_part(layer.rosa_A["default"]).clone()
    with pytest.raises(ValueError, match=r"have drifted apart|draw has failed"):
        resample(model)
    assert layer.adapters["default"].draws == 1
    assert torch.equal(own_part(layer.rosa_A["default"]), before)


def test_copies_that_have_drifted_apart_are_noticed(tmp_path):
    save(tmp_path, "llama")
    in_processes(2, tmp_path, drifting_apart, tmp_path)


def with_dropout(rank, folder):
    base = decoder(folder / "llama", torch.float64, distributed.get_world_size())
    config = RosaConfig(r=2, target_modules="all-linear", rosa_dropout=0.3)
    model = get_peft_model(base, config).train()
    batches = torch.randint(50, (4, 4, 7), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(rank)
    before = changes(model)
    train(model, batches, (2,))
    assert all(all_equal(change) for change in changes(model))
    whole = [layer.rosa_A["default"].to_local() for _, layer in rosa_layers(model)]
    assert all(all_equal(a) for a in whole if a.shape[-1] == 24)  # of layers cut by their outputs
    assert not any(map(torch.equal, changes(model), before))


def test_dropout_whatever_the_seeds(tmp_path):
    save(tmp_path, "llama")
    in_processes(2, tmp_path, with_dropout, tmp_path)


def by_trainer(rank, folder):
    size = distributed.get_world_size()
    rows = torch.randint(50, (24, 6), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row} for row in rows]
    # Accelerate lets tensor parallelism run on accelerators alone.
    ParallelismConfig._validate_accelerator = lambda *_: None
    arguments = TrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(1)
    base = decoder(folder / "llama", torch.float64, size)
    model = get_peft_model(base, RosaConfig(r=3, target_modules="all-linear"))
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RosaCallback(every=3)])
    trainer.train()
    trainer.save_model(folder / f"saved-{size}")
    if rank == 0:
        (folder / f"losses-{size}").write_text(str(trainer.state.log_history[-1]["train_loss"]))


def test_by_trainer(tmp_path):
    save(tmp_path, "llama")
    found = []
    for size in (1, 2):
        (folder := tmp_path / str(size)).mkdir()
        in_processes(size, folder, by_trainer, tmp_path)
        found.append(load_file(tmp_path / f"saved-{size}" / "adapter_model.safetensors"))
    alone, cut = found
    assert {int(value) for key, value in cut.items() if key.endswith("draws")} == {4}
    assert alone.keys() == cut.keys()
    same(cut.values(), alone.values())
    losses = [float((tmp_path / f"losses-{size}").read_text()) for size in (1, 2)]
    assert losses[1] == pytest.approx(losses[0])
