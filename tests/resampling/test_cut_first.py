"""Adapters for models that were cut over processes (FSDP 2) as they were loaded."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from rosa import RosaCallback, RosaConfig, resample, watch
from rosa.layers.in_model import rosa_layers
from rosa.pretrained.sharding import is_dtensor
from tests.processes import in_processes, without_gloo

pytestmark = without_gloo

TARGETS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]


def save(folder):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).double().save_pretrained(folder / "llama")


def load(folder, cut=True):
    size = distributed.get_world_size()
    how = {"distributed_config": DistributedConfig(fsdp_size=size)} if cut and size > 1 else {}
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64, **how)
    assert is_dtensor(base.lm_head.weight) == bool(how)
    return base


def rows_of(seed, whole=False):
    rows = torch.randint(50, (12, 5), generator=torch.Generator().manual_seed(seed))
    parts = 1 if whole else distributed.get_world_size()
    return rows.chunk(parts)[0 if whole else distributed.get_rank()]


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=rows_of(99, whole=True)).logits
        with model.disable_adapter():
            return found, model(input_ids=rows_of(99, whole=True)).logits


def train(model, steps=4):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        if step == 1:
            watch(model)
        for part in rows_of(step).chunk(2):  # the mean of the parts' gradients, as they add up
            (model(input_ids=part).logits.square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            resample(model, optimizer)


def files_of(rank, folder, loads):
    """What is saved is loaded into a cut model and into a whole one, and goes on alike."""
    model = get_peft_model(load(folder), RosaConfig(r=3, target_modules=TARGETS))
    train(model)
    place = folder / f"adapter{rank}"
    model.save_pretrained(place)
    how = {"is_trainable": True, **loads}
    again = PeftModel.from_pretrained(load(folder), place, **how)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-12)
    whole = PeftModel.from_pretrained(load(folder, cut=False), place, **how)
    torch.testing.assert_close(outputs(whole), outputs(model), rtol=0, atol=1e-12)
    for each in (model, again):
        train(each)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize("loads", [{}, {"low_cpu_mem_usage": True}], ids=str)
def test_files_are_loaded(tmp_path, loads):
    save(tmp_path)
    in_processes(2, tmp_path, files_of, tmp_path, loads)


def several(rank, folder):
    """Adapters beside each other: each is what it is alone."""
    model = get_peft_model(load(folder), RosaConfig(r=3, target_modules=TARGETS))
    train(model)
    first = outputs(model)
    model.add_adapter("second", RosaConfig(r=2, target_modules=["q_proj"], seed=5))
    model.set_adapter("second")
    train(model)
    second = outputs(model)
    alone = get_peft_model(
        load(folder), RosaConfig(r=2, target_modules=["q_proj"], seed=5), "second"
    )
    train(alone)
    torch.testing.assert_close(second, outputs(alone), rtol=0, atol=1e-10)
    model.set_adapter("default")
    torch.testing.assert_close(outputs(model), first, rtol=0, atol=1e-12)
    model.delete_adapter("second")
    plain = model.merge_and_unload()
    with torch.no_grad():
        found = plain(input_ids=rows_of(99, whole=True)).logits
    torch.testing.assert_close(found, first[0], rtol=0, atol=1e-12)


def test_several_adapters(tmp_path):
    save(tmp_path)
    in_processes(2, tmp_path, several, tmp_path)


def refusals(rank, folder):
    base = load(folder)
    for beside in (
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"bias": "all", "target_modules": ["q_proj"]},
        {"trainable_token_indices": {"embed_tokens": [1]}, "target_modules": ["q_proj"]},
    ):
        with pytest.raises(ValueError, match="would be each process's own"):
            get_peft_model(base, RosaConfig(**beside))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match="along the first dimension, over all processes"):
        get_peft_model(fully_shard(load(folder, cut=False), mesh=mesh), RosaConfig())
    model = get_peft_model(load(folder), RosaConfig(r=3, target_modules=TARGETS))
    train(model)
    _, layer = next(rosa_layers(model))
    with torch.no_grad():
        layer.rosa_B["default"].add_(rank)
    with pytest.raises(ValueError, match="have drifted apart in the processes"):
        resample(model)


def test_what_would_go_wrong_is_told(tmp_path):
    save(tmp_path)
    in_processes(2, tmp_path, refusals, tmp_path)


def by_trainer(rank, folder):
    size = distributed.get_world_size()
    rows = torch.randint(50, (24, 6), generator=torch.Generator().manual_seed(5))
    arguments = TrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        max_steps=8,
        per_device_train_batch_size=6 // size,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=4,
        save_only_model=True,  # as Trainer asks of a model that was cut as it was loaded
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(1)
    trainer = Trainer(
        get_peft_model(load(folder), RosaConfig(r=3, target_modules="all-linear")),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[RosaCallback(every=3)],
    )
    trainer.train()
    trainer.save_model(folder / f"saved-{size}")


def test_trainer_trains_what_one_process_does(tmp_path):
    save(tmp_path)
    found = []
    for size in (1, 2):
        (place := tmp_path / str(size)).mkdir()
        in_processes(size, place, by_trainer, tmp_path)
        found.append(load_file(tmp_path / f"saved-{size}" / "adapter_model.safetensors"))
    assert {int(value) for key, value in found[1].items() if key.endswith("draws")} == {4}
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
