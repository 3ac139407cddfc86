"""A model whose layers are cut over processes (tensor parallelism), in a loop of torch.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

The model is a small decoder of letters with random weights, which stands for your pretrained one.
"""

import inspect
import os
import tempfile

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import rosa  # registers ROSA with PEFT

size, first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
text = torch.tensor(list(inspect.getsource(inspect).encode()))  # Python's own code, as bytes

torch.manual_seed(0)  # the same model in every process
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
random = {"vocab_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(LlamaConfig(**random, **sizes)).save_pretrained(folder)
    cut = DistributedConfig(tp_size=size) if size > 1 else None
    base = AutoModelForCausalLM.from_pretrained(folder, distributed_config=cut)
model = get_peft_model(base, rosa.RosaConfig(r=4, target_modules="all-linear"))  # cut, then adapted
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
)

torch.manual_seed(1)  # and the same batches
for step in range(120):
    if step == 16:
        rosa.watch(model)
    if step in (20, 70):
        rosa.resample(model, optimizer)  # in all processes; each layer is drawn in one for all
    starts = torch.randint(len(text) - 64, (16,)).tolist()
    ids = torch.stack([text[start : start + 64] for start in starts]).to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if first and step in (0, 119):
        print(f"step {step}: loss {loss.item():.2f}")

here = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
held = sum(part.numel() for part in here) / model.num_parameters()
if first:
    print(f"process 0 holds {held:.0%} of the weights")
model.save_pretrained("runs/tensor_parallel", is_main_process=first)  # in all: shards are gathered
if size > 1:
    torch.distributed.destroy_process_group()
