"""Recipes: TOML files that say everything about a training run but where the data lies."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kangaroo.checks import shown
from kangaroo.errors import ConfigError
from kangaroo.toml import Count, Positive, Section, Share, Weight, parse_table, read_table

Below1 = Annotated[float, Field(ge=0, lt=1)]
Tokens = Annotated[int, Field(gt=0, le=1 << 20)]
"""Of a sequence, or sequences of a batch: more would not fit in any memory."""


class DataSection(Section):
    """Which documents to learn from, and on which of their tokens."""

    sources: tuple[str, ...] = ()
    """Keep only rows of these sources; empty keeps all."""
    held_out: Positive = 200
    """Documents set aside for evaluation: never trained on."""
    assistant_only: bool = True
    """Learn only from what the assistant says (paper); false learns from every token."""
    limit: Positive | None = None
    """Train on at most this many documents."""


class OptimizerSection(Section):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Weight = 0.0
    betas: tuple[Below1, Below1] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class ScheduleSection(Section):
    """How long: linear warm-up, constant, decay to zero over the last `decay_steps`."""

    steps: Positive
    warmup_steps: Count = 0
    decay_steps: Count = 0
    decay: Literal["linear", "cosine"] = "linear"
    """A straight line, or half a cosine wave (Loshchilov and Hutter 2017)."""
    batch_sequences: Tokens = 8
    accumulate: Positive = 1
    """Micro-batches per optimiser step, each of `batch_sequences`; gradients are those of the joint batch."""
    sequence_length: Tokens = 256
    lengthen_at: Positive | None = None
    """From this step on, sequences are `long_sequence_length` long and as many fewer."""
    long_sequence_length: Tokens | None = None

    @model_validator(mode="after")
    def _lengthen_both_or_neither(self) -> Self:
        if (self.lengthen_at is None) != (self.long_sequence_length is None):
            raise ValueError("lengthen_at and long_sequence_length go together")
        return self

    def learning_rate_factor(self, step: int) -> float:
        """Multiplier of the peak learning rate at optimiser step `step`, from 0."""
        warm = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        left = min(1.0, (self.steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return min(warm, left if self.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def shape(self, step: int) -> tuple[int, int]:
        """(sequences, length) of a micro-batch at `step`."""
        if self.lengthen_at is None or self.long_sequence_length is None or step < self.lengthen_at:
            return self.batch_sequences, self.sequence_length
        rows = self.batch_sequences * self.sequence_length // self.long_sequence_length
        return max(1, rows), self.long_sequence_length

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence of the run."""
        return max(self.sequence_length, self.long_sequence_length or 0)


class RunSection(Section):
    """How the run is carried out; none of it changes what is learnt beyond rounding."""

    compile: bool = False
    """Compile the model; for targets trained from scratch only."""
    mixed_precision: Literal["off", "bf16"] = "off"
    """Run matrix products in bfloat16 by autocast; weights and optimiser stay in float32."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision the frozen target is loaded in; auto is float32 on a CPU, the checkpoint's own on a GPU."""
    checkpoint_every: Positive = 100
    evaluate_every: Positive = 200
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""


class ModelSection(Section):
    """Shape of a model trained from scratch (Llama architecture, byte-level BPE), and which tokens it has."""

    vocab_size: Positive | None = None
    """Tokens of the tokenizer that is trained along with it."""
    tokenizer: str | None = None
    """"demo", a folder or a hub name: take that tokenizer, and its vocabulary, instead of training one."""
    layers: Positive
    width: Positive
    mlp_width: Positive
    heads: Positive
    context: Positive
    initializer_range: float = 0.02

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Self:
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError("give vocab_size to train a tokenizer, or tokenizer to take an existing one; not both")
        return self


class AdapterSection(Section):
    """What is trained, and from where."""

    exit_layer: Count
    """Layers of the target that run before the adapter."""
    variant: Literal["kangaroo", "own-head", "full-layer", "mlp-only"] = "kangaroo"
    layers: Positive = 1
    """Trained layers, one behind the other; the paper has one."""
    draft_vocabulary: Count = 0
    """Draft over so many tokens, the most frequent of those learnt from; 0 for all of the target's."""
    init: str = "target"
    """Start from what fits of the target's own layers from the exit on ("target"), from noise ("random"), or
    from a trained adapter: "demo" or "demo-paper", which ship with the demo, or its folder."""


class MedusaSection(Section):
    """What is trained, and from where."""

    heads: Positive = 4
    """Tokens predicted from one state, beyond the next."""
    init: Literal["target", "random"] = "target"
    """Start the heads' maps to the vocabulary from the target's own, or from noise."""


class MedusaLossSection(Section):
    """Cross-entropy of each head against the text."""

    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Head i, from 0, weighs decay ** i."""


class LossSection(Section):
    """Weights of the two terms, both means over the tokens learnt from."""

    soft_cross_entropy: Weight = 1.0
    """Cross-entropy of the draft distribution q against the target's p, at temperature 1 (paper)."""
    acceptance: Weight = 0.0
    """1 - sum of min(p, q): the chance that a token drawn from q is rejected."""

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if self.soft_cross_entropy + self.acceptance == 0:
            raise ValueError("soft_cross_entropy and acceptance must not both be 0")
        return self


class RegenerateSection(Section):
    """Replace the answers of some training documents by the target's own, generated once before training."""

    prompts: Positive
    """How many documents, the first of the shuffled training set; the others keep their words."""
    max_tokens: Positive = 256
    temperature: Weight = 0.0
    batch: Positive = 16


class SynthesisSection(Section):
    """Documents that the target writes whole, once before training (Magpie, Xu et al. 2024): the run takes no data.

    By a chat template the target writes a user's turn and answers it; without one it writes plain text.
    """

    documents: Positive
    """How many are written, the held-out ones included; empty and repeated ones are dropped."""
    prompt_tokens: Positive = 64
    """Most tokens of a user's turn; one that breaks off there is cut at the end of its last sentence. Chats only."""
    max_tokens: Positive = 128
    """Most tokens of an answer, or of a plain text."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of users' turns and of plain text. At 0 all of them would be the same."""
    answer_temperature: Weight = 0.0
    """Of answers. Chats only."""
    batch: Positive = 32


class EvaluationSection(Section):
    """Held-out text that the target writes once: at every evaluation, drafting is simulated on it."""

    prompts: Positive = 32
    max_tokens: Positive = 128
    batch: Positive = 16
    """Prompts answered together, and sequences evaluated together."""


class ChainEvaluationSection(EvaluationSection):
    """The same, and the chain that is simulated."""

    max_draft: Positive = 6
    """The paper's gamma."""
    threshold: Share = 0.6
    """The paper's eta."""


class Recipe(Section):
    """What every kind of run has in common."""

    kind: str
    output: Path
    seed: Count = 0
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    run: RunSection = RunSection()


class TargetRecipe(Recipe):
    """Train a target from scratch by next-token loss."""

    kind: Literal["target"]
    model: ModelSection


class FrozenTargetRecipe(Recipe):
    """What drafts for a frozen target is trained."""

    target: str
    """"demo", a folder, or a hub name."""
    states: Path | None = None
    """A folder to keep the target's last states in, where a row of text that comes again, in a later epoch or another
    run, finds them: the deep layers are not run for it. Width x bytes of the dtype for every token learnt from."""
    states_gigabytes: Annotated[float, Field(gt=0)] = 20.0
    """How much that folder may hold; the deep layers are run for what no longer fits, each time."""
    evaluation: EvaluationSection = EvaluationSection()
    regenerate: RegenerateSection | None = None
    synthesis: SynthesisSection | None = None

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.run.compile:
            raise ValueError("run.compile is for targets trained from scratch")
        if self.evaluation.prompts > self.data.held_out:
            raise ValueError(f"evaluation.prompts is {self.evaluation.prompts}, more than data.held_out")
        return self

    @model_validator(mode="after")
    def _synthesis_is_all_the_data(self) -> Self:
        if self.synthesis is None:
            return self
        if self.regenerate is not None:
            raise ValueError("drop the regenerate section: with synthesis, all answers are the target's own already")
        if self.data.sources:
            raise ValueError(
                "drop data.sources: it chooses among rows of data files, and with synthesis there are none"
            )
        if self.synthesis.documents <= self.data.held_out:
            raise ValueError(
                f"synthesis.documents is {self.synthesis.documents}, which leaves none to train on beside the "
                f"{self.data.held_out} of data.held_out"
            )
        return self


class AdapterRecipe(FrozenTargetRecipe):
    """Train an adapter for a frozen target."""

    kind: Literal["adapter"]
    adapter: AdapterSection
    loss: LossSection = LossSection()
    evaluation: ChainEvaluationSection = ChainEvaluationSection()


class MedusaRecipe(FrozenTargetRecipe):
    """Train Medusa heads for a frozen target."""

    kind: Literal["medusa"]
    medusa: MedusaSection = MedusaSection()
    loss: MedusaLossSection = MedusaLossSection()


RECIPES: dict[str, type[Recipe]] = {"target": TargetRecipe, "adapter": AdapterRecipe, "medusa": MedusaRecipe}


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe; `overrides` maps dotted keys ("schedule.steps") to values that replace the file's.

    Raises ConfigError naming the key, and the nearest known one for a key that does not exist.
    """
    table = read_table(path, overrides)
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in RECIPES:
        raise ConfigError(f"{path}: kind must be one of {', '.join(RECIPES)}, got {shown(kind)}")
    return parse_recipe(table, str(path))


def parse_recipe(table: dict[str, Any], name: str) -> Recipe:
    """The recipe of a table whose `kind` is known; `name` says in errors where it came from."""
    return parse_table(RECIPES[table["kind"]], table, name)
