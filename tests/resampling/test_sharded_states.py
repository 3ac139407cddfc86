"""State dicts of a model that `fully_shard` (FSDP 2) has spread: what loads them goes on."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from rosa import RosaCallback, RosaConfig, resample, watch
from tests.models import tiny_bert, tiny_gpt2
from tests.processes import fsdp_on_cpus, in_processes, without_gloo

pytestmark = without_gloo

WHOLE = {"full_state_dict": True, "broadcast_from_rank0": True, "strict": False}
"""As Accelerate's savers ask, and with `cpu_offload` where there are several processes."""


TARGETS = ["query", "dense", "word_embeddings", "c_attn", "c_proj", "wte"]


def adapted(tiny=tiny_bert, **options):
    """The same in every process, with a weight that the outermost module holds."""
    torch.manual_seed(0)
    base = tiny().double().eval()
    torch.manual_seed(1)
    return get_peft_model(base, RosaConfig(r=2, target_modules=TARGETS, **options))


def shard(model):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for module in [m for m in model.modules() if type(m).__name__ == "BertLayer"]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def own_rows(seed):
    rows = torch.randint(50, (12, 5), generator=torch.Generator().manual_seed(seed))
    return rows.chunk(distributed.get_world_size())[distributed.get_rank()]


def optimizer_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)


def train(model, optimizer, steps, draws):
    for step in steps:
        if step in draws and model.peft_config["default"].is_informed:
            watch(model)
        model(own_rows(step)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in draws:
            resample(model, optimizer)


def outputs(model):
    with torch.no_grad():
        found = model(own_rows(99)).logits
        with model.disable_adapter():
            return found, model(own_rows(99)).logits


def assert_goes_on(folder, directions, load):
    """A model that was loaded into is the one that was saved, and is trained and drawn as it is."""
    first, other = shard(adapted(directions=directions)), shard(adapted(directions=directions))
    optimizer, another = optimizer_of(first), optimizer_of(other)
    train(first, optimizer, range(5), (1, 3))
    train(other, another, range(7, 9), (7,))  # and it was drawn, and is whole from a pass
    load(other, first, (first, optimizer), another)
    torch.testing.assert_close(outputs(other), outputs(first), rtol=0, atol=1e-12)
    for model, its in ((first, optimizer), (other, another)):
        model.reshard()
        train(model, its, range(10, 14), (11,))
    torch.testing.assert_close(outputs(other), outputs(first), rtol=0, atol=1e-10)
    other.save_pretrained(folder / str(distributed.get_rank()))
    base = adapted().unload()
    plain = PeftModel.from_pretrained(base, str(folder / str(distributed.get_rank())))
    torch.testing.assert_close(outputs(plain), outputs(first), rtol=0, atol=1e-10)


def moments_into(model, into, trained, options):
    moments = get_optimizer_state_dict(*trained, options=options)
    set_optimizer_state_dict(model, into, copy.deepcopy(moments), options=options)


def torchs(adapter_only, offload):
    def load(model, of, trained, into):
        options = StateDictOptions(**WHOLE, cpu_offload=offload)
        kept = StateDictOptions(**WHOLE, cpu_offload=offload, ignore_frozen_params=adapter_only)
        set_model_state_dict(model, get_model_state_dict(of, options=kept), options=options)
        moments_into(model, into, trained, options)

    return load


def pefts(model, of, trained, into):
    set_peft_model_state_dict(model, get_peft_model_state_dict(of))
    moments_into(model, into, trained, StateDictOptions(full_state_dict=True))


def in_shards(model, of, trained, into):
    model.load_state_dict(copy.deepcopy(of.state_dict()))
    into.load_state_dict(copy.deepcopy(trained[1].state_dict()))


def by_hand(model, of, trained, into):
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    model.load_state_dict(get_model_state_dict(of, options=options), strict=False)
    moments_into(model, into, trained, options)


LOADERS = {
    "by hand": by_hand,
    "in shards": in_shards,
    "adapter": torchs(True, False),
    "adapter, by main memory": torchs(True, True),
    "model": torchs(False, False),
    "model, by main memory": torchs(False, True),
    "peft": pefts,
}


def go_on(rank, folder, directions, loader):
    assert_goes_on(folder, directions, LOADERS[loader])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("size", "directions"), [(2, "gradient"), (3, "svd"), (1, "orthonormal")])
def test_a_loaded_model_goes_on(tmp_path, size, directions, loader):
    in_processes(size, tmp_path, go_on, tmp_path, directions, loader)


def into_more(rank):
    """A state without the second adapter leaves that one as it is."""
    first, other = adapted(directions="svd"), adapted(directions="svd")
    other.add_adapter("second", RosaConfig(r=2, target_modules=["query"], seed=5))
    shard(first)
    shard(other)
    train(first, optimizer_of(first), range(3), (1,))
    other.set_adapter("second")
    second = optimizer_of(other)
    train(other, second, range(3), (1,))
    expected = outputs(other)
    other.reshard()
    options = StateDictOptions(**WHOLE, cpu_offload=True)
    set_model_state_dict(other, get_model_state_dict(first, options=options), options=options)
    torch.testing.assert_close(outputs(other), expected)
    other.reshard()
    other.set_adapter("default")
    torch.testing.assert_close(outputs(other), outputs(first))


def test_what_is_not_in_a_state_stays_as_it_is(tmp_path):
    in_processes(2, tmp_path, into_more)


def by_trainer(rank, folder, kind, resume):
    fsdp_on_cpus()
    size = distributed.get_world_size()
    rows = torch.randint(50, (24, 6), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row} for row in rows]
    spread = {"version": 2, "state_dict_type": kind, "cpu_ram_efficient_loading": False}
    spread["transformer_layer_cls_to_wrap"] = ["GPT2Block"]
    arguments = TrainingArguments(
        str(folder / f"run-{size}"),
        use_cpu=True,
        max_steps=8,
        per_device_train_batch_size=6 // size,
        per_device_eval_batch_size=6 // size,
        learning_rate=1e-1,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so it is an early one, of fewer draws
        report_to="none",
        disable_tqdm=True,
        **({"fsdp": True, "fsdp_config": spread} if size > 1 else {}),
    )
    trainer = Trainer(
        adapted(partial(tiny_gpt2, tied=False), directions="gradient"),
        arguments,
        train_dataset=data,
        eval_dataset=data[:12],
        callbacks=[RosaCallback(every=3)],
    )
    if kind == "SHARDED_STATE_DICT":
        with pytest.raises(ValueError, match="fsdp_state_dict_type to FULL_STATE_DICT"):
            trainer.train()
        return
    step = f"checkpoint-{resume}"
    trainer.train(resume_from_checkpoint=str(folder / f"run-{size}" / step) if resume else None)
    found = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    found.append(trainer.evaluate()["eval_loss"])
    trainer.save_model(folder / f"saved-{size}")
    if rank == 0:
        torch.save(found, folder / f"losses-{size}.pt")


def test_trainer_trains_and_goes_on(tmp_path):
    found = []
    for size, resume in ((1, 0), (2, 0), (2, 4), (3, 6)):
        (place := tmp_path / f"{size}-{resume}").mkdir()
        if size == 3:  # the checkpoint is whole: for any number of processes
            (tmp_path / "run-2").rename(tmp_path / "run-3")
        in_processes(size, place, by_trainer, tmp_path, "FULL_STATE_DICT", resume)
        adapter = load_file(tmp_path / f"saved-{size}" / "adapter_model.safetensors")
        found.append((torch.load(tmp_path / f"losses-{size}.pt"), adapter))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_checkpoints_that_cannot_be_gone_on_from_are_refused(tmp_path):
    in_processes(2, tmp_path, by_trainer, tmp_path, "SHARDED_STATE_DICT", 0)
