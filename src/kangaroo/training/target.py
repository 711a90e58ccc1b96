"""Training a target from scratch: next-token loss on a Llama architecture, nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kangaroo.training.data import TokenStream
from kangaroo.training.objective import Loss
from kangaroo.training.recipe import ModelSection, RunSection


def build_model(shape: ModelSection, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A freshly initialised causal LM of the recipe's shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        initializer_range=shape.initializer_range,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # No pad_token_id: transformers would start that embedding (the end-of-turn token) at exactly zero, where the
    # norms of 24 layers multiply gradients until they overflow.
    return LlamaForCausalLM(config)


class NextToken:
    """Cross-entropy of the next token at every trained position."""

    def __init__(self, model: Any, tokenizer: Any, held_out: TokenStream, run: RunSection):
        self.model, self.tokenizer, self.held_out, self.run = model, tokenizer, held_out, run
        self._logits = torch.compile(self._forward) if run.compile else self._forward

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All weights of the model."""
        return dict(self.model.named_parameters())

    def _forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.run.mixed_precision == "bf16"):
            return self.model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, trained: Tensor) -> Loss:
        """Cross-entropy summed over the trained tokens, in nats."""
        logits = self._logits(tokens[:, :-1]).float()
        each = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        mask = trained[:, 1:].flatten()
        return Loss((each * mask).sum(), int(mask.sum()), {})

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Mean next-token loss in nats on held-out documents, at the run's first sequence length."""
        length = 256
        rows = max(1, min(32, (len(self.held_out.tokens) - 1) // length))
        tokens, trained = self.held_out.batch(0, rows, length, seed=0)
        result = self.loss(tokens, trained)
        mean = float(result.total) / result.tokens
        return {"loss": mean, "score": -mean}

    def save(self, folder: Path) -> None:
        """A Hugging Face checkpoint in bfloat16, tokenizer included."""
        state = {name: value.to(torch.bfloat16) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
