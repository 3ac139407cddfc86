"""ROSA in a loop of Accelerate, in one process or several:

torchrun --nproc-per-node 2 examples/accelerate_loop.py

The model is a small decoder of letters with random weights, which stands for your pretrained one.
"""

import inspect

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import rosa  # registers ROSA with PEFT

FIRST, EVERY, WATCHED = 20, 60, 4
torch.manual_seed(0)

cpu = not torch.cuda.is_available()
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=cpu)
text = torch.tensor(list(inspect.getsource(inspect).encode()))  # Python's own code, as bytes
texts = list(text[: len(text) // 64 * 64].view(-1, 64))
loader = DataLoader(texts, batch_size=8, shuffle=True)  # type: ignore[arg-type]  # a list will do

base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
)
model = get_peft_model(base, rosa.RosaConfig(r=4, target_modules="all-linear"))
factors = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.0)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

step = 0  # of the optimizer
for ids in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:  # a step is done: in every process at once
        step += 1
        if step == FIRST - WATCHED:
            rosa.watch(model)
        if step >= FIRST and (step - FIRST) % EVERY == 0:
            rosa.resample(model, optimizer)
            accelerator.print(f"step {step}: a new subspace; loss {loss.item():.2f}")

accelerator.wait_for_everyone()
unwrapped = accelerator.unwrap_model(model)
unwrapped.save_pretrained("runs/example-accelerate", is_main_process=accelerator.is_main_process)
accelerator.print(f"step {step}: saved to runs/example-accelerate")
