"""Kangaroo inside code written for transformers: one more argument to `model.generate`."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import kangaroo
from kangaroo import demo
from kangaroo.demo.smollm2 import smollm2

folder = smollm2()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
questions = ["Can you help me to book a table for two tonight?", "What is 12 plus 30?"]
inputs = tokenizer.apply_chat_template(
    [[{"role": "user", "content": question}] for question in questions],
    add_generation_prompt=True,
    padding=True,
    return_dict=True,
    return_tensors="pt",
)
config = GenerationConfig(
    max_new_tokens=48, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
)

plain = model.generate(**inputs, generation_config=config)
faster = model.generate(
    **inputs, generation_config=config, custom_generate=kangaroo.custom_generate(adapter=demo.ADAPTER)
)

for text in tokenizer.batch_decode(faster[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
    print(text, "\n")
print("the same as without:", torch.equal(plain, faster))
