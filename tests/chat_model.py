"""A tiny chat model in a folder: random Llama weights and a tokenizer learnt from a few sentences."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.model import Target
from kangaroo.training.target import train_tokenizer

SENTENCES = [
    "Where would you like to eat tonight?",
    "The answer is 42, naïve café.",
    "I need 3 tickets to Oakland.",
] * 3


def save_chat_model(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer to folder/target and an untrained adapter to folder/adapter."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300, context=1024)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers[1:]:
        layer.self_attn.o_proj.weight.data.mul_(0.2)
        layer.mlp.down_proj.weight.data.mul_(0.2)
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    adapter = Adapter(Target(model), AdapterConfig(exit_layer=1))
    adapter.initialise(0, from_target=True)
    adapter.layers[0].attention.o_proj.weight.data.mul_(0.1)
    adapter.save(folder / "adapter", {"made_by": "tests"})
    return folder
