"""ROSA in Lightning, by a callback of ten lines. (pip install lightning)

The model is a small decoder of letters with random weights, which stands for your pretrained one.
"""

import inspect

import lightning
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import rosa  # registers ROSA with PEFT


class Draws(lightning.Callback):
    def __init__(self, first: int = 20, every: int = 60, watched: int = 4) -> None:
        self.first, self.every, self.watched = first, every, watched

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        step = trainer.global_step  # of the optimizer
        if batch_idx % trainer.accumulate_grad_batches == 0:
            if step == self.first - self.watched:
                rosa.watch(pl_module)
            if step >= self.first and (step - self.first) % self.every == 0:
                rosa.resample(pl_module, trainer.optimizers)
                print(f"step {step}: a new subspace")


class Decoder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=256, num_hidden_layers=2, initializer_range=0.1, **sizes)
        base = LlamaForCausalLM(config)
        self.model = get_peft_model(base, rosa.RosaConfig(r=4, target_modules="all-linear"))

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
        )


torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(inspect).encode()))  # Python's own code, as bytes
texts = list(text[: len(text) // 64 * 64].view(-1, 64))
decoder = Decoder()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(max_steps=150, accelerator="cpu", callbacks=[Draws()], **quiet)
trainer.fit(decoder, DataLoader(texts, batch_size=16, shuffle=True))
decoder.model.save_pretrained("runs/example-lightning")
print(f"loss {trainer.callback_metrics['loss']:.2f}; saved to runs/example-lightning")
