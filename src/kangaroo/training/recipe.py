"""Recipes: TOML files that say everything about a training run but where the data lies."""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kangaroo.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of a recipe: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Which documents to learn from, and on which of their tokens."""

    sources: tuple[str, ...] = ()
    """Keep only rows of these sources; empty keeps all."""
    held_out: Positive = 200
    """Documents set aside for evaluation: never trained on."""
    assistant_only: bool = True
    """Learn only from what the assistant says (paper); false learns from every token."""
    limit: Positive | None = None


class OptimizerSection(Section):
    """AdamW."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0


class ScheduleSection(Section):
    """How long: linear warm-up, constant, linear decay to zero over the last `decay_steps`."""

    steps: Positive
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Annotated[int, Field(ge=0)] = 0
    batch_sequences: Positive = 8
    accumulate: Positive = 1
    """Micro-batches per optimiser step, each of `batch_sequences`; gradients are those of the joint batch."""
    sequence_length: Positive = 256
    lengthen_at: Positive | None = None
    """From this step on, sequences are `long_sequence_length` long and as many fewer."""
    long_sequence_length: Positive | None = None

    def learning_rate_factor(self, step: int) -> float:
        """Multiplier of the peak learning rate at optimiser step `step`, from 0."""
        warm = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        left = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return min(1.0, warm, left)

    def shape(self, step: int) -> tuple[int, int]:
        """(sequences, length) of a micro-batch at `step`."""
        if self.lengthen_at is None or self.long_sequence_length is None or step < self.lengthen_at:
            return self.batch_sequences, self.sequence_length
        rows = self.batch_sequences * self.sequence_length // self.long_sequence_length
        return max(1, rows), self.long_sequence_length


class RunSection(Section):
    """How the run is carried out; none of it changes what is learnt beyond rounding."""

    compile: bool = False
    mixed_precision: Literal["off", "bf16"] = "off"
    checkpoint_every: Positive = 100
    evaluate_every: Positive = 200


class ModelSection(Section):
    """Shape of a target trained from scratch (Llama architecture, byte-level BPE)."""

    vocab_size: Positive
    layers: Positive
    width: Positive
    mlp_width: Positive
    heads: Positive
    context: Positive
    initializer_range: float = 0.02


class Recipe(Section):
    """What every kind of run has in common."""

    kind: str
    output: Path
    seed: int = 0
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    run: RunSection = RunSection()


class TargetRecipe(Recipe):
    """Train a target from scratch by next-token loss."""

    kind: Literal["target"]
    model: ModelSection


RECIPES: dict[str, type[Recipe]] = {"target": TargetRecipe}


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe; `overrides` maps dotted keys ("schedule.steps") to values that replace the file's.

    Raises ConfigError naming the key, and the nearest known one for a key that does not exist.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for dotted, value in (overrides or {}).items():
        *sections, key = dotted.split(".")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    kind = table.get("kind")
    if kind not in RECIPES:
        raise ConfigError(f"{path}: kind must be one of {', '.join(RECIPES)}, got {kind!r}")
    try:
        return RECIPES[kind].model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, RECIPES[kind])}") from None


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        return f"{'.'.join(path)}: {first['msg']}, got {first.get('input')!r}"
    section: Any = model
    for part in path[:-1]:
        section = section.model_fields[part].annotation
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.0)
    return f"unknown key {'.'.join(path)!r}; did you mean {near[0]!r}?"
