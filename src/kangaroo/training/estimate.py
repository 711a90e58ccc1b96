"""What a run will take, before it starts: memory by counting, time by trying."""

import math
import time
from dataclasses import dataclass

from kangaroo.machine import available_bytes, synchronise
from kangaroo.training import ranks
from kangaroo.training.batches import Batches
from kangaroo.training.objective import Objective
from kangaroo.training.recipe import Recipe

BYTES_PER_TRAINED = 16
"""Weight, gradient and two moments, in float32."""


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """Bytes and seconds."""

    parameters: int
    """Trained parameters."""
    frozen_bytes: int
    """Weights of the target, loaded already."""
    training_bytes: int
    """Trained weights, their gradients and the optimiser's moments."""
    activation_bytes: int
    """The largest micro-batch: states, attention scores and logits; right to a factor of two."""
    available_bytes: int
    """Free on the device."""
    seconds_per_step: float
    """Measured on one micro-batch of the recipe's first shape, which the target has not seen before."""
    seconds: float
    """All remaining steps and evaluations."""

    @property
    def peak_bytes(self) -> int:
        """Weights, training state and activations together."""
        return self.frozen_bytes + self.training_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        """Whether what is still to be allocated fits in what is free, as far as can be told."""
        return self.training_bytes + self.activation_bytes <= self.available_bytes


@dataclass(frozen=True, slots=True)
class Floor:
    """What drafting that takes no training would bring on the target's held-out answers."""

    rate: float
    """Tokens a round, simulated."""
    agreement: float
    """The share of tokens that would be drafted right."""


@dataclass(frozen=True, slots=True)
class Floors:
    """What an adapter has to beat."""

    early_exit: Floor
    trigram: Floor


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is going to do, and what it has to beat."""

    exit_layer: int
    target_layers: int
    draft_vocabulary: int
    """0 for the target's own."""
    draft_share: float
    """Weights that drafting a token reads, as a share of those of a plain step."""
    documents: int
    steps: int
    epochs: float
    seconds: float
    floors: Floors


def estimate(objective: Objective, batches: Batches, recipe: Recipe, *, step: int) -> RunEstimate:
    """Estimate a run from step `step` on. Runs two micro-batches, whose gradients are thrown away."""
    schedule, parameters = recipe.schedule, objective.parameters()
    count = sum(parameter.numel() for parameter in parameters.values())
    shapes = [schedule.shape(0), schedule.shape(max(0, schedule.steps - 1))]
    per_token = _seconds_per_token(objective, batches, recipe)
    tokens = [schedule.accumulate * rows * length for rows, length in map(schedule.shape, range(step, schedule.steps))]
    every = recipe.run.evaluate_every
    evaluations = schedule.steps // every - step // every + (schedule.steps % every > 0)
    return RunEstimate(
        parameters=count,
        frozen_bytes=objective.frozen_bytes,
        training_bytes=count * BYTES_PER_TRAINED,
        activation_bytes=max(objective.activation_bytes(math.ceil(r / ranks.count()), length) for r, length in shapes),
        available_bytes=available_bytes(objective.device),
        seconds_per_step=per_token * schedule.accumulate * schedule.batch_sequences * schedule.sequence_length,
        seconds=per_token * (sum(tokens) + evaluations * objective.evaluation_tokens),
    )


def _seconds_per_token(objective: Objective, batches: Batches, recipe: Recipe) -> float:
    rows, length = recipe.schedule.shape(0)
    seconds = 0.0
    # The first run pays for allocations and kernels that the others find ready.
    for number in range(2):
        batch = batches.batch(number, rows, length, recipe.seed).to(objective.device)
        synchronise(objective.device)
        began = time.perf_counter()
        objective.loss(batch).total.backward()  # type: ignore[no-untyped-call]
        synchronise(objective.device)
        seconds = time.perf_counter() - began
    for parameter in objective.parameters().values():
        parameter.grad = None
    return seconds / (rows * length)
