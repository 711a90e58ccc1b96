"""Kangaroo inside code written for transformers: one more argument to `model.generate`."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

import kangaroo
from kangaroo import demo
from kangaroo.demo.smollm2 import smollm2

folder = smollm2()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
questions = ["Can you help me to book a table for two tonight?", "What is 12 plus 30?"]
conversations = [[{"role": "user", "content": question}] for question in questions]
asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
inputs = tokenizer.apply_chat_template(conversations, padding=True, **asked)
config = GenerationConfig(
    max_new_tokens=48, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
)

plain = model.generate(**inputs, generation_config=config)
drop_in = kangaroo.custom_generate(adapter=demo.ADAPTER)
faster = model.generate(**inputs, generation_config=config, custom_generate=drop_in)

for text in tokenizer.batch_decode(faster[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
    print(text, "\n")
print("the same as without:", torch.equal(plain, faster))

# A streamer is an argument of the drop-in: transformers would not hand it on. It takes one prompt at a time.
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
streaming = kangaroo.custom_generate(adapter=demo.ADAPTER, streamer=streamer)
one = tokenizer.apply_chat_template(conversations[0], **asked)
model.generate(**one, generation_config=config, custom_generate=streaming)
