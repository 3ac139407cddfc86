"""ROSA in a loop of torch: watch a few steps, draw, and draw again every so often.

The model is a small decoder of letters with random weights, which stands for your pretrained one.
"""

import inspect

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import rosa  # registers ROSA with PEFT

STEPS, FIRST, EVERY, WATCHED = 200, 20, 60, 4
torch.manual_seed(0)

text = torch.tensor(list(inspect.getsource(inspect).encode()))  # Python's own code, as bytes


def batch() -> dict[str, torch.Tensor]:
    starts = torch.randint(len(text) - 64, (16,)).tolist()
    ids = torch.stack([text[start : start + 64] for start in starts])
    return {"input_ids": ids, "labels": ids}


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
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
)

for step in range(STEPS):
    if step == FIRST - WATCHED:
        rosa.watch(model)  # looks where the loss falls, for the first draw; later ones need none
    if step >= FIRST and (step - FIRST) % EVERY == 0:
        rosa.resample(model, optimizer)  # between an optimizer's step and the next forward pass
        print(f"step {step}: a new subspace")
    loss = model(**batch()).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, STEPS - 1):
        print(f"step {step}: loss {loss.item():.2f}")

model.eval()
example = batch()
with torch.no_grad():
    adapted = model(**example).logits
    plain = model.merge_and_unload()  # of the base's own class
    difference = (plain(**example).logits - adapted).abs().max().item()
print(f"merged into a plain {type(plain).__name__}; its logits differ by {difference:.1e}")
