"""The training loop: one for every objective. Step `s` depends on the recipe, the data and the state, on nothing else."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kangaroo.training.checkpoint import load_state, save_state
from kangaroo.training.data import TokenStream
from kangaroo.training.objective import Objective
from kangaroo.training.recipe import OptimizerSection, Recipe

STATE = "state.safetensors"
METRICS = "metrics.jsonl"
Report = Callable[[dict[str, float]], None]


def make_optimizer(objective: Objective, settings: OptimizerSection) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = objective.parameters().values()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def fit(objective: Objective, stream: TokenStream, recipe: Recipe, report: Report, *, resume: bool) -> None:
    """Run the recipe's steps from the start, or with `resume` from the last checkpoint in its output folder."""
    optimizer = make_optimizer(objective, recipe.optimizer)
    folder, schedule = recipe.output, recipe.schedule
    first = load_state(folder / STATE, objective.parameters(), optimizer) if resume else 0
    best = float("-inf")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS).open("a" if resume else "w", encoding="utf-8") as metrics:

        def record(row: dict[str, float]) -> None:
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            report(row)

        for step in range(first, schedule.steps):
            record(train_step(objective, optimizer, stream, recipe, step))
            done = step + 1
            if done % recipe.run.evaluate_every == 0 or done == schedule.steps:
                figures = objective.evaluate()
                record({"step": done, **{f"held_out/{name}": value for name, value in figures.items()}})
                if figures["score"] > best:
                    best = figures["score"]
                    objective.save(folder / "best")
            if done % recipe.run.checkpoint_every == 0 or done == schedule.steps:
                save_state(folder / STATE, objective.parameters(), optimizer, done)


def train_step(
    objective: Objective, optimizer: torch.optim.AdamW, stream: TokenStream, recipe: Recipe, step: int
) -> dict[str, float]:
    """One optimiser step over all its micro-batches; returns the row for the metrics file."""
    started, schedule = time.perf_counter(), recipe.schedule
    rows, length = schedule.shape(step)
    total, tokens = 0.0, 0
    for micro in range(schedule.accumulate):
        batch, trained = stream.batch(step * schedule.accumulate + micro, rows, length, recipe.seed)
        loss = objective.loss(batch, trained)
        loss.total.backward()
        total, tokens = total + float(loss.total.detach()), tokens + loss.tokens
    parameters = list(objective.parameters().values())
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(1, tokens))
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = recipe.optimizer.learning_rate * schedule.learning_rate_factor(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return {
        "step": step + 1,
        "loss": total / max(1, tokens),
        "gradient_norm": float(norm),
        "learning_rate": optimizer.param_groups[0]["lr"],
        "tokens_per_second": schedule.accumulate * rows * length / seconds,
    }


def is_resumable(folder: Path) -> bool:
    """Whether a checkpoint lies in `folder`."""
    return (folder / STATE).is_file()
