"""A chat by TRL's SFTTrainer, with a loss on the assistant's words alone. (pip install trl)

The tokenizer and the small decoder, of random weights, are made here and stand for a chat model.
"""

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import rosa  # registers ROSA with PEFT

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def turns(a: int, b: int) -> dict[str, list[dict[str, str]]]:
    question = {"role": "user", "content": f"What is {NUMBERS[a]} and {NUMBERS[b]}?"}
    return {"messages": [question, {"role": "assistant", "content": f"It is {NUMBERS[a + b]}."}]}


chats = [turns(a, b) for a in range(11) for b in range(11 - a)]
special = ["<|user|>", "<|assistant|>", "<|end|>"]
letters = ByteLevelBPETokenizer()
texts = [turn["content"] for chat in chats for turn in chat["messages"]]
letters.train_from_iterator(texts, vocab_size=400, special_tokens=special)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=letters._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
)
tokenizer.chat_template = TEMPLATE

torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
sizes |= {"num_hidden_layers": 2, "initializer_range": 0.2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
config = rosa.RosaConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config)

small = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}  # TRL's are True
args = SFTConfig("runs/example-chat", assistant_only_loss=True, learning_rate=1e-2, **small)
args.max_steps, args.per_device_train_batch_size, args.report_to = 200, 16, []
draws = rosa.RosaCallback()
data = Dataset.from_list(chats)
SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[draws]).train()

asked = tokenizer.apply_chat_template(
    turns(3, 4)["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
written = model.generate(**asked, max_new_tokens=12, do_sample=False)[0]
print(f"drawn at {draws.drawn_at}; {tokenizer.decode(written)}")
