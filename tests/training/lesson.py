"""A tiny target on disk, a few conversations and a recipe: what every training test starts from."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.batches import Packed
from kangaroo.training.corpus import choose_documents
from kangaroo.training.medusa import MedusaObjective
from kangaroo.training.metrics import METRICS, read_metrics
from kangaroo.training.recipe import AdapterRecipe, MedusaRecipe, read_recipe
from kangaroo.training.run import begin_adapter, load_target, new_heads, train
from kangaroo.training.target import train_tokenizer
from kangaroo.training.target_text import TargetText

NAMES = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal"]
FOODS = ["soup", "rice", "bread", "plums", "eggs"]

ADAPTER = """
kind = "adapter"
target = "{target}"
output = "{output}"

[adapter]
exit_layer = 2

[data]
held_out = 6

[optimizer]
learning_rate = 5e-3

[schedule]
steps = 8
warmup_steps = 2
batch_sequences = 2
sequence_length = 64

[run]
checkpoint_every = 3
evaluate_every = 2

[evaluation]
prompts = 4
max_tokens = 12
batch = 3
threshold = 0.3
"""

MEDUSA = """
kind = "medusa"
target = "{target}"
output = "{output}"

[medusa]
heads = 3

[data]
held_out = 6

[optimizer]
learning_rate = 5e-3

[schedule]
steps = 8
warmup_steps = 2
decay_steps = 6
decay = "cosine"
batch_sequences = 2
sequence_length = 64

[run]
checkpoint_every = 3
evaluate_every = 2

[evaluation]
prompts = 4
max_tokens = 12
batch = 3
"""

TARGET = """
kind = "target"
output = "{output}"

[model]
vocab_size = 300
layers = 2
width = 16
mlp_width = 24
heads = 2
context = 64

[data]
held_out = 6

[schedule]
steps = 6
batch_sequences = 2
sequence_length = 32

[run]
checkpoint_every = 2
evaluate_every = 3
"""


def conversations(count: int = 40) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        name, food = NAMES[i % len(NAMES)], FOODS[i % len(FOODS)]
        turns = [f"What does {name} eat?", f"{name} eats {food}.", "And then?", f"Then {name} eats {food} again."]
        messages = [{"role": ("user", "assistant")[j % 2], "content": text} for j, text in enumerate(turns)]
        rows.append({"source": "meals", "messages": messages[: 2 + 2 * (i % 2)]})
    return rows


def make_tokenizer() -> Any:
    texts = [m["content"] for row in conversations() for m in row["messages"]]
    return train_tokenizer(texts, 300, 128)


def make_target(folder: Path) -> None:
    """A Llama whose deep layers say little, so that an adapter has something to agree with."""
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.data *= 0.4
        layer.mlp.down_proj.weight.data *= 0.4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Lesson:
    """A recipe on disk, its data and its output folder."""

    recipe: Path
    data: Path
    output: Path

    def settings(self, **overrides: Any) -> AdapterRecipe:
        recipe = read_recipe(self.recipe, dotted(overrides))
        assert isinstance(recipe, AdapterRecipe)
        return recipe

    def train(self, *, resume: bool = False, report: Callable[[Any], None] = lambda _: None, **overrides: Any) -> Path:
        """Overrides are keys with two underscores for the dot: schedule__steps=3."""
        return train(self.recipe, [self.data], overrides=dotted(overrides), resume=resume, report=report)

    def rows(self) -> list[dict[str, float]]:
        """Metrics without the one figure that is a measurement."""
        rows = read_metrics(self.output / METRICS)
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def dotted(overrides: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in overrides.items()}


def build(run: Lesson, **overrides: Any) -> tuple[AdapterObjective, Packed]:
    """The objective and batches of a run, without running it."""
    recipe = run.settings(**overrides)
    target, tokenizer = load_target(recipe)
    make_objective = begin_adapter(target, recipe)
    training, held_out = choose_documents([run.data], recipe.data, recipe.seed)
    author = TargetText(target, tokenizer, recipe, lambda _: None)
    corpus = author.training(training)
    return make_objective(author.held_out(held_out), corpus), Packed(corpus)


def build_medusa(run: Lesson, **overrides: Any) -> tuple[MedusaObjective, Packed]:
    """The same for heads."""
    recipe = read_recipe(run.recipe, dotted(overrides))
    assert isinstance(recipe, MedusaRecipe)
    target, tokenizer = load_target(recipe)
    training, held_out = choose_documents([run.data], recipe.data, recipe.seed)
    author = TargetText(target, tokenizer, recipe, lambda _: None)
    objective = MedusaObjective(target, new_heads(target, recipe), author.held_out(held_out), recipe)
    return objective, Packed(author.training(training))
