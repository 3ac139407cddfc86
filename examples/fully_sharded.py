"""A model whose weights lie in parts over processes (FSDP 2), in a loop of torch.

    torchrun --nproc-per-node 2 examples/fully_sharded.py

The model is a small decoder of letters with random weights, which stands for your pretrained one.
"""

import inspect
import os

import torch
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import rosa  # registers ROSA with PEFT

alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ |= {name: value for name, value in alone.items() if name not in os.environ}
device = "cuda" if torch.cuda.is_available() else "cpu"
mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
first = mesh.get_rank() == 0
text = torch.tensor(list(inspect.getsource(inspect).encode()))  # Python's own code, as bytes

torch.manual_seed(0)  # the same model in every process
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
random = {"vocab_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
base = LlamaForCausalLM(LlamaConfig(**random, **sizes))
model = get_peft_model(base, rosa.RosaConfig(r=4, target_modules="all-linear"))
for layer in model.get_base_model().model.layers:  # the adapter first, then its module
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
)

torch.manual_seed(mesh.get_rank())  # other data in each
for step in range(120):
    if step == 16:
        rosa.watch(model)
    if step in (20, 70):
        rosa.resample(model, optimizer)  # in all processes; each layer is drawn in one for all
    starts = torch.randint(len(text) - 64, (16,)).tolist()
    ids = torch.stack([text[start : start + 64] for start in starts]).to(device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if first and step in (0, 119):
        print(f"step {step}: loss {loss.item():.2f}")

held = sum(p.to_local().numel() for p in model.parameters()) / base.num_parameters()
print(f"process {mesh.get_rank()} holds {held:.0%} of the weights")
model.save_pretrained("runs/fully_sharded", is_main_process=first)  # in all: parts are gathered
torch.distributed.destroy_process_group()
