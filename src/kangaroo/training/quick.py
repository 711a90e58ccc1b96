"""Training an adapter without a recipe: a model, text, and how long it may take.

Everything else follows. The exit lies behind a sixteenth of the layers, as in the paper (2 of 32). Two whole layers are
trained, and draft over a part of the vocabulary where that is large. AdamW's rate is 3e-3 up to a width of 576, where
it was tried, and falls with the width beyond (Yang et al. 2022, arXiv 2203.03466: for hidden weights, in proportion to
1 / width). The deep layers run once for every row of text, for at most SHARE_OF_STATES of the time, and evaluations
take at most SHARE_OF_EVALUATIONS; the rest goes to steps over rows whose states are kept.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kangaroo.checks import shown
from kangaroo.drafters.kangaroo.self_draft import SelfDraft
from kangaroo.errors import ConfigError, ModelError
from kangaroo.files import write_text
from kangaroo.loading import fastest_cpu_dtype, load_config
from kangaroo.machine import synchronise
from kangaroo.toml import lay_over
from kangaroo.training import ranks
from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.batches import Packed, Share
from kangaroo.training.checkpoint import find_progress
from kangaroo.training.corpus import Corpus, Given, choose_documents
from kangaroo.training.estimate import Plan
from kangaroo.training.floors import measure_floors
from kangaroo.training.loop import Trainer
from kangaroo.training.recipe import AdapterRecipe, parse_recipe
from kangaroo.training.report import TrainingReport
from kangaroo.training.run import begin_adapter, joined_for, load_target
from kangaroo.training.target_text import TargetText

RATE, WIDTH = 3e-3, 576
LARGE, DRAFTED = 16384, 8192
"""A vocabulary beyond which drafting over a part of it pays, and that part."""
ROWS, LENGTH = 4, 512
SHARE_OF_STATES, SHARE_OF_EVALUATIONS = 0.4, 0.2
FEWEST_STEPS, FEWEST_BATCHES = 20, 5
FEWEST_EVALUATIONS, MOST_EVALUATIONS = 2, 10
RECIPE = "recipe.toml"
LONGEST = 525_600
"""Minutes, which is a year."""
SIZES = ("vocab_size", "num_hidden_layers", "hidden_size", "max_position_embeddings")
"""Of a model, by their names in its configuration."""


def train_quickly(
    model: str,
    paths: Sequence[Path],
    report: TrainingReport,
    *,
    minutes: float,
    output: Path,
    settings: Mapping[str, Any],
) -> Path:
    """Train an adapter for a model in about so many minutes; returns the folder of the best one.

    `settings` replace what would be chosen, by dotted key ("adapter.exit_layer"). The recipe that it comes to is kept
    in the output folder, as recipe.toml: with it a run that was stopped goes on.

    Raises ConfigError if the time is too short to learn anything in, or if the output folder holds a run or another
    process writes to it; DataError or ModelError.
    """
    if not 0 < minutes <= LONGEST:
        raise ConfigError(f"--minutes must be a number > 0 and at most {LONGEST:,}, got {minutes:g}")
    deadline = time.perf_counter() + 60 * minutes
    recipe = choose_recipe(model, output, settings)
    with joined_for(recipe):
        return _train_until(deadline, recipe, Given(paths), report if ranks.is_first() else lambda _: None)


def _train_until(deadline: float, recipe: AdapterRecipe, given: Given, report: TrainingReport) -> Path:
    target, tokenizer = load_target(recipe)
    identity = {"data": given.digest, "target": target.fingerprint}
    ranks.agree(identity)
    progress = ranks.by_first(lambda: find_progress(recipe, identity, resume=False))
    make_objective = begin_adapter(target, recipe)
    training, held_out = choose_documents(given.files(), recipe.data, recipe.seed)
    author = TargetText(target, tokenizer, recipe, report)
    kept, corpus = ranks.by_first(lambda: author.held_out(held_out)), author.training(training)
    objective = make_objective(kept, corpus)
    costs = StepCosts.measure(objective, Packed(corpus), recipe)
    fit = ranks.by_first(lambda: fit_into(deadline - time.perf_counter(), costs, Packed(corpus), recipe))
    corpus = author.training(training[: fit.documents])
    objective = make_objective(kept, corpus)
    recipe = _with_schedule(recipe, fit)

    def announce() -> None:
        write_text(recipe.output / RECIPE, to_toml(recipe.model_dump(mode="json", exclude_none=True)))
        report(_plan(objective, corpus, recipe, deadline - time.perf_counter()))

    ranks.by_first(announce)
    return Trainer(objective, Packed(corpus), recipe, progress).fit(report)


def choose_recipe(model: str, output: Path, settings: Mapping[str, Any]) -> AdapterRecipe:
    """What suits a model, before it is known how long a step takes. Raises ModelError or ConfigError."""
    config = load_config(model).get_text_config()
    native = torch.cuda.is_available() or fastest_cpu_dtype() == torch.bfloat16
    vocabulary, layers, width, context = (_size(config, name) for name in SIZES)
    table: dict[str, Any] = {
        "kind": "adapter",
        "target": model,
        "states": str(output / "states"),
        "output": str(output),
        "adapter": {
            "exit_layer": max(1, layers // 16),
            "variant": "full-layer",
            "layers": 2,
            "draft_vocabulary": DRAFTED if vocabulary > LARGE else 0,
        },
        "loss": {"soft_cross_entropy": 1.0, "acceptance": 0.5},
        "data": {"held_out": 32},
        "optimizer": {"learning_rate": RATE * min(1.0, WIDTH / width)},
        "schedule": {
            "steps": FEWEST_STEPS,
            "batch_sequences": ROWS,
            "sequence_length": min(LENGTH, context),
        },
        "run": {"mixed_precision": "bf16" if native else "off", "dtype": "bfloat16" if native else "float32"},
        "evaluation": {"prompts": 32, "max_tokens": 96, "threshold": 0.3},
    }
    lay_over(table, settings)
    recipe = parse_recipe(table, "--model")
    assert isinstance(recipe, AdapterRecipe)
    return recipe


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if type(value) is not int or value < 1:
        raise ModelError(f"the model's {name} should be a number of at least 1, got {shown(value)}")
    return value


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step over text whose states are not known yet, over text whose states are kept, of an evaluation."""

    first: float
    again: float
    evaluation: float

    @classmethod
    def measure(cls, objective: AdapterObjective, batches: Packed, recipe: AdapterRecipe) -> "StepCosts":
        """Run two micro-batches, one of them twice; the first pays for allocations and kernels."""
        seconds = []
        for number in (0, 1, 1):
            share = Share(batches, ranks.number(), ranks.count())
            batch = share.batch(number, *recipe.schedule.shape(0), recipe.seed).to(objective.device)
            synchronise(objective.device)
            began = time.perf_counter()
            objective.loss(batch).total.backward()  # type: ignore[no-untyped-call]
            synchronise(objective.device)
            seconds.append(time.perf_counter() - began)
        for parameter in objective.parameters().values():
            parameter.grad = None
        rows, length = recipe.schedule.shape(0)
        return cls(seconds[1], seconds[2], seconds[2] * objective.evaluation_tokens / (rows * length))


@dataclass(frozen=True, slots=True)
class Fit:
    """What is done in the time."""

    documents: int
    """The first of the training documents, to learn from."""
    steps: int
    evaluations: int


def fit_into(seconds: float, costs: StepCosts, batches: Packed, recipe: AdapterRecipe) -> Fit:
    """What takes about so many seconds. Raises ConfigError if they are too few."""
    affordable = int(SHARE_OF_EVALUATIONS * seconds / costs.evaluation)
    evaluations = max(FEWEST_EVALUATIONS, min(MOST_EVALUATIONS, affordable))
    left = seconds - evaluations * costs.evaluation
    states = max(0.0, costs.first - costs.again)
    shortest = FEWEST_BATCHES * states + FEWEST_STEPS * costs.again
    if left < shortest:
        needed = FEWEST_EVALUATIONS * costs.evaluation + shortest
        raise ConfigError(
            f"--minutes is too short: {FEWEST_STEPS} steps and {FEWEST_EVALUATIONS} evaluations take about "
            f"{needed / 60:.1f} minutes here, beside what has passed already"
        )
    rows, length = recipe.schedule.shape(0)
    packed = batches.rows(length)
    known = max(FEWEST_BATCHES, int(SHARE_OF_STATES * left / max(states, 1e-9)))
    chosen = packed[: known * rows]
    documents = 1 + max(index for row in chosen for index in row)
    steps = int((left - states * len(chosen) / rows) / costs.again)
    return Fit(documents, max(FEWEST_STEPS, steps), evaluations)


def _with_schedule(recipe: AdapterRecipe, fit: Fit) -> AdapterRecipe:
    table, steps = recipe.model_dump(mode="json"), fit.steps
    table["data"]["limit"] = fit.documents
    table["schedule"] |= {"steps": steps, "warmup_steps": min(50, steps // 10), "decay_steps": steps // 3}
    table["run"] |= {
        "evaluate_every": max(1, steps // fit.evaluations),
        "checkpoint_every": max(1, min(50, steps // 4)),
    }
    found = parse_recipe(table, "--model")
    assert isinstance(found, AdapterRecipe)
    return found


def _plan(objective: AdapterObjective, corpus: Corpus, recipe: AdapterRecipe, seconds: float) -> Plan:
    rows, length = recipe.schedule.shape(0)
    adapter = objective.adapter
    return Plan(
        exit_layer=adapter.config.exit_layer,
        target_layers=objective.target.num_layers,
        draft_vocabulary=adapter.config.draft_vocabulary,
        draft_share=SelfDraft(objective.target, adapter, adapter.config.exit_layer).weight_share,
        documents=len(corpus),
        steps=recipe.schedule.steps,
        epochs=recipe.schedule.steps * rows / len(Packed(corpus).rows(length)),
        seconds=seconds,
        floors=measure_floors(objective, corpus),
    )


def to_toml(table: Mapping[str, Any]) -> str:
    """A recipe's table as a file; its values are numbers, strings, and lists of them, written as in JSON."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    sections = [f"\n[{key}]\n{to_toml(value)}" for key, value in table.items() if isinstance(value, Mapping)]
    return "\n".join([*plain, *sections]) + "\n"
