"""Data-parallel training in two real processes: every one draws the same subspaces."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import get_peft_model
from torch import multiprocessing, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from rosa import RosaConfig, resample, watch
from rosa.layers.kinds import rosa_layers
from tests.models import tiny_bert

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


def train(rank: int, store: str, directions: str) -> None:
    """Each process on data of its own; fails unless both hold the same model at the end.

    One of the two has its moments sharded over the processes.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    base = tiny_bert()
    config = RosaConfig(
        r=2, directions=directions, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model = get_peft_model(base, config)
    wrapped = nn.parallel.DistributedDataParallel(model)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = inner = torch.optim.AdamW(factors, lr=1e-2)
    if directions == "orthonormal":
        optimizer = ZeroRedundancyOptimizer(factors, torch.optim.AdamW, lr=1e-2)
        inner = optimizer.optim
    torch.manual_seed(100 + rank)
    for step in range(6):
        if step % 2 == 0:
            watch(wrapped)
        elif step > 1:
            state = dict(inner.state)
            resample(wrapped, optimizer)
            drawn = {
                f
                for _, la in rosa_layers(model)
                for f in (*la.rosa_A.values(), *la.rosa_B.values())
            }
            assert drawn & state.keys()
            assert not drawn & inner.state.keys()
        ids = torch.randint(50, (4, 6))
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
    parts = [p.detach().flatten() for p in model.parameters()]
    for _, layer in rosa_layers(model):
        parts.append(layer.adapters["default"].terms.A.flatten())
    mine = torch.cat(parts)
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both), float((both[0] - both[1]).abs().max())
    # The wrapper's reducer must not be the last to hold the group: its destructor waits, with
    # Python's lock, for a thread that wants that lock to let go of its last tensors.
    del wrapped
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("directions", ["orthonormal", "gradient"])
def test_processes_agree(tmp_path, directions):
    arguments = (str(tmp_path / "store"), directions)
    multiprocessing.spawn(train, arguments, nprocs=2, daemon=True)
