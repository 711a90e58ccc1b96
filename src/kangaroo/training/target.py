"""Training a target from scratch: next-token loss on a Llama architecture, nothing else."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kangaroo.training.batches import Batch, Joined
from kangaroo.training.objective import Loss
from kangaroo.training.recipe import ModelSection, RunSection

EVALUATION_LENGTH, EVALUATION_ROWS = 256, 32


def build_model(shape: ModelSection, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A freshly initialised causal LM of the recipe's shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size or len(tokenizer),
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
    """Cross-entropy of the next token at every position whose next token is learnt from."""

    frozen_bytes = 0

    def __init__(self, model: Any, tokenizer: Any, held_out: Joined, run: RunSection):
        self.model, self.tokenizer, self.held_out, self.run = model, tokenizer, held_out, run
        self.device: torch.device = model.device
        held_out_tokens = len(held_out.corpus.tokens) - 1
        self._evaluation_length = min(EVALUATION_LENGTH, model.config.max_position_embeddings, held_out_tokens)
        self._evaluation_rows = min(EVALUATION_ROWS, held_out_tokens // self._evaluation_length)
        self.evaluation_tokens = self._evaluation_rows * self._evaluation_length
        self._logits = torch.compile(self._forward) if run.compile else self._forward

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All weights of the model."""
        return dict(self.model.named_parameters())

    def _forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.run.mixed_precision == "bf16"):
            return self.model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy summed over the trained tokens, in nats."""
        logits = self._logits(batch.tokens[:, :-1]).float()
        each = functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
        mask = batch.trained[:, 1:].flatten()
        return Loss((each * mask).sum(), int(mask.sum()), {})

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Mean next-token loss in nats on held-out text; `score` is its negative."""
        batch = self.held_out.batch(0, self._evaluation_rows, self._evaluation_length, seed=0)
        result = self.loss(batch.to(self.device))
        mean = float(result.total) / max(1, result.tokens)
        return {"loss": mean, "score": -mean}

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """A Hugging Face checkpoint in bfloat16 with tokenizer and training.json, replacing the folder as a whole."""
        part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        state = {name: value.to(torch.bfloat16) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(part, state_dict=state)
        self.tokenizer.save_pretrained(part)
        (part / "training.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def activation_bytes(self, rows: int, length: int) -> int:
        """Saved activations of every layer, and logits with their gradients, in float32."""
        config = self.model.config
        layer = 12 * config.hidden_size + 4 * config.intermediate_size + config.num_attention_heads * length
        return int(4 * rows * length * (config.num_hidden_layers * layer + 4 * config.vocab_size))


BEGIN, END, ROLES = "<|begin|>", "<|end|>", ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary of `vocab_size` tokens; digits are split so that arithmetic is visible."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
