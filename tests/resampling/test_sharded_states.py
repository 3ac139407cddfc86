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
from torch.distributed import checkpoint
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


def adapted(tiny=tiny_bert, dtype=torch.float64, **options):
    """The same in every process, with a weight that the outermost module holds."""
    torch.manual_seed(0)
    base = tiny().to(dtype).eval()
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
        model(own_rows(step)).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in draws:
            resample(model, optimizer)


def outputs(model):
    with torch.no_grad():
        found = model(own_rows(99)).logits
        with model.disable_adapter():
            return found, model(own_rows(99)).logits


def assert_goes_on(folder, load, dtype=torch.float64, **options):
    """A model that was loaded into is the one that was saved, and is trained and drawn as it is."""
    first, other = (shard(adapted(dtype=dtype, **options)) for _ in range(2))
    fresh = shard(adapted(dtype=dtype, **options))
    optimizer, another = optimizer_of(first), optimizer_of(other)
    train(first, optimizer, range(5), (1, 3))
    train(other, another, range(7, 9), (7,))  # and it was drawn, and is whole from a pass
    near = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 0}
    for model, its in ((fresh, optimizer_of(fresh)), (other, another)):
        load(model, first, (first, optimizer), its)
        torch.testing.assert_close(outputs(model), outputs(first), **near)
        first.reshard()
        model.reshard()
    for model, its in ((first, optimizer), (other, another)):
        train(model, its, range(10, 14), (11,))
    torch.testing.assert_close(outputs(other), outputs(first), **near)
    other.save_pretrained(folder / str(distributed.get_rank()))
    base = adapted(dtype=dtype).unload()
    plain = PeftModel.from_pretrained(base, str(folder / str(distributed.get_rank())))
    near["atol"] = max(near["atol"], 10 * torch.finfo(dtype).eps)
    torch.testing.assert_close(outputs(plain), outputs(first), **near)


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
    state = {k: v for k, v in of.state_dict().items() if "rosa_" in k}
    model.load_state_dict(copy.deepcopy(state), strict=False)
    model.set_adapter("default")  # as more may come, it is not in the weights yet
    moments_into(model, into, trained, options)


def in_two_calls(model, of, trained, into):
    """Adapters first: what stands in the weights that come then is told by marks before them."""
    with torch.no_grad():
        model.base_model.model.classifier.weight.add_(1)  # a weight of another base
    state = copy.deepcopy(of.state_dict())
    for ours in (True, False):
        part = {key: value for key, value in state.items() if ("rosa_" in key) == ours}
        model.load_state_dict(part, strict=False)
    into.load_state_dict(copy.deepcopy(trained[1].state_dict()))


LOADERS = {
    "adapter": torchs(True, False),
    "adapter, by main memory": torchs(True, True),
    "model": torchs(False, False),
    "model, by main memory": torchs(False, True),
    "in shards": in_shards,
    "by hand": by_hand,
    "in two calls": in_two_calls,
    "peft": pefts,
}


def go_on(rank, folder, options):
    for name, load in LOADERS.items():
        (place := folder / name).mkdir(exist_ok=True)
        try:
            assert_goes_on(place, load, **options)
        except Exception as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"directions": "gradient"}),
        (2, {"directions": "gradient", "dtype": torch.bfloat16}),
        (2, {"directions": "svd", "trained": "B"}),
        (3, {"directions": "orthonormal", "trained": "A"}),
        (3, {"directions": "svd"}),
        (1, {"directions": "orthonormal"}),
    ],
    ids=str,
)
def test_a_loaded_model_goes_on(tmp_path, size, options):
    in_processes(size, tmp_path, go_on, tmp_path, options)


def in_files(rank, folder):
    """Torch's own savers write into the tensors that they are given, which lie where they lay."""
    first, other = (shard(adapted(directions="orthonormal")) for _ in range(2))
    train(first, optimizer_of(first), range(4), (1,))
    train(other, optimizer_of(other), range(7, 10), (8,))
    first.reshard()
    other.reshard()
    for whole in (True, False):
        get = get_model_state_dict if whole else get_peft_model_state_dict
        put = set_model_state_dict if whole else set_peft_model_state_dict
        place = folder / f"files-{whole}"
        checkpoint.save({"model": get(first)}, checkpoint_id=place)
        state = {"model": get(other)}
        checkpoint.load(state, checkpoint_id=place)
        put(other, state["model"])
        torch.testing.assert_close(outputs(other), outputs(first), rtol=0, atol=1e-12)
        first.reshard()
        other.reshard()
        train(other, optimizer_of(other), range(2), ())


def test_files_in_shards_of_as_many_draws(tmp_path):
    in_processes(2, tmp_path, in_files, tmp_path)


def without_factors(rank):
    """A saver that leaves out what is frozen leaves an inactive adapter's factors out."""
    first, other = adapted(directions="svd"), adapted(directions="svd")
    for model in (first, other):
        model.add_adapter("second", RosaConfig(r=2, target_modules=["query"], seed=5))
        shard(model)
    options = StateDictOptions(**WHOLE, ignore_frozen_params=True)
    train(first, optimizer_of(first), range(3), (1,))
    set_model_state_dict(other, get_model_state_dict(first, options=options), options=options)
    torch.testing.assert_close(outputs(other), outputs(first))
    for name in ("second", "default"):  # the second one is trained, and then it is frozen
        first.reshard()
        first.set_adapter(name)
        train(first, optimizer_of(first), range(3), (1,))
    state = get_model_state_dict(first, options=options)
    with pytest.raises(ValueError, match=r"was given rosa_offset.second.A.*and no more"):
        set_model_state_dict(other, state, options=options)


def test_an_adapter_that_came_in_part_is_refused(tmp_path):
    in_processes(2, tmp_path, without_factors)


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


def by_trainer(rank, folder, kind, trained, saves, resume):
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
        save_strategy=saves,
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
        adapted(partial(tiny_gpt2, tied=False), directions="gradient", trained=trained),
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


@pytest.mark.parametrize(
    ("trained", "saves", "runs"),
    [
        ("both", "steps", [(1, 0), (2, 0), (2, 4), (3, 6)]),
        ("B", "steps", [(1, 0), (2, 0), (2, 4)]),
        ("A", "best", [(1, 0), (2, 0)]),  # it loads right after an evaluation
    ],
)
def test_trainer_trains_and_goes_on(tmp_path, trained, saves, runs):
    found = []
    for size, resume in runs:
        (place := tmp_path / f"{size}-{resume}").mkdir()
        if size == 3:  # the checkpoint is whole: for any number of processes
            (tmp_path / "run-2").rename(tmp_path / "run-3")
        in_processes(size, place, by_trainer, tmp_path, "FULL_STATE_DICT", trained, saves, resume)
        adapter = load_file(tmp_path / f"saved-{size}" / "adapter_model.safetensors")
        found.append((torch.load(tmp_path / f"losses-{size}.pt"), adapter))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


def test_checkpoints_that_cannot_be_gone_on_from_are_refused(tmp_path):
    in_processes(2, tmp_path, by_trainer, tmp_path, "SHARDED_STATE_DICT", "both", "steps", 0)
