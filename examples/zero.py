"""A model and an optimizer in parts over processes (DeepSpeed's ZeRO 3), in a loop of its own.

    torchrun --nproc-per-node 2 examples/zero.py

The model is a small decoder of letters with random weights, which stands for your pretrained one.
"""

import inspect
import os

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import rosa  # registers ROSA with PEFT

alone = dict.fromkeys(["RANK", "LOCAL_RANK", "MASTER_PORT"], "0")
alone |= {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
os.environ |= {name: value for name, value in alone.items() if name not in os.environ}
first = os.environ["RANK"] == "0"
text = torch.tensor(list(inspect.getsource(inspect).encode()))  # Python's own code, as bytes

torch.manual_seed(0)  # the same model in every process
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
random = {"vocab_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
base = LlamaForCausalLM(LlamaConfig(**random, **sizes))
model = get_peft_model(base, rosa.RosaConfig(r=4, target_modules="all-linear"))
factors = [p for p in model.parameters() if p.requires_grad]
engine, optimizer, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.0),
    config={
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": 3},  # in 1 and 2 the optimizer alone is in parts
        "gradient_clipping": 0.0,  # else DeepSpeed cuts the gradient's norm to 1
        "zero_allow_untested_optimizer": True,  # as torch's AdamW
    },
)

torch.manual_seed(engine.global_rank)  # other data in each
for step in range(120):
    if step == 16:
        rosa.watch(engine)
    if step in (20, 70):
        rosa.resample(engine, optimizer)  # in all processes; each layer is drawn in one for all
    starts = torch.randint(len(text) - 64, (16,)).tolist()
    ids = torch.stack([text[start : start + 64] for start in starts]).to(engine.device)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    if first and step in (0, 119):
        print(f"step {step}: loss {loss.item():.2f}")

model.save_pretrained("runs/zero", is_main_process=first)  # all give their parts
if first:
    print("by", get_accelerator().device_name())
torch.distributed.destroy_process_group()
