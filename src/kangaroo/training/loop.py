"""The training loop, one for every objective. A step depends on recipe, data and state, and on nothing else.

After Ctrl-C the step is finished and saved before the run stops.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError

from kangaroo.errors import CapacityError, ConfigError, KangarooError
from kangaroo.inputs import is_file
from kangaroo.tensors import checksum
from kangaroo.training import ranks
from kangaroo.training.batches import Batches, Share
from kangaroo.training.checkpoint import STATE, Progress, load_state, save_state, training_provenance
from kangaroo.training.estimate import estimate
from kangaroo.training.metrics import Metrics, Unwritten
from kangaroo.training.objective import Objective
from kangaroo.training.recipe import OptimizerSection, Recipe
from kangaroo.training.report import Clock, TrainingReport


class Interrupted(KeyboardInterrupt):
    """The user asked for a stop, and the state was saved. The message says how to go on."""

    def __init__(self, folder: Path, step: int):
        super().__init__(f"stopped after step {step}; the state is saved in {folder}, resume with --resume")
        self.folder, self.step = folder, step


class Interruption:
    """While entered, the first Ctrl-C sets `requested`; the second stops at once, back to the last checkpoint."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        # Python delivers signals to the main thread only; elsewhere the caller's own handling stays as it is.
        self._installable = threading.current_thread() is threading.main_thread()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Self:
        if self._installable:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installable:
            signal.signal(signal.SIGINT, self._previous)


BEST = "best"


def make_optimizer(objective: Objective, settings: OptimizerSection) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = objective.parameters().values()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


class Trainer:
    """A run from where it stands to the last step of its recipe, by one process or by several ranks together.

    The state is saved before the first step, so that a run can be resumed from any moment of its life; metrics rows
    and best weights written after the last checkpoint are written again, identically, when it is.
    """

    def __init__(self, objective: Objective, batches: Batches, recipe: Recipe, progress: Progress):
        self.objective, self.recipe = objective, recipe
        self.batches = Share(batches, ranks.number(), ranks.count())
        self.folder, self.identity = recipe.output, progress.identity
        self.step, self.best = progress.step, progress.best
        self.optimizer = make_optimizer(objective, recipe.optimizer)
        if is_file(self.folder / STATE):
            load_state(self.folder / STATE, objective.parameters(), self.optimizer)
        elif ranks.is_first():
            self.checkpoint()
        if ranks.count() > 1:
            weights = {name: p.detach().cpu() for name, p in objective.parameters().items()}
            ranks.agree({"the checksum of the weights": checksum(weights)})

    def fit(self, report: TrainingReport) -> Path:
        """Train; returns the folder of the best weights.

        Raises Interrupted after Ctrl-C, ConfigError if the loss is not finite, CapacityError if memory or disk do not
        suffice; the last checkpoint is intact in every case.
        """
        run, steps, first = self.recipe.run, self.recipe.schedule.steps, ranks.is_first()
        with (
            Metrics(self.folder, self.step, tensorboard=run.tensorboard) if first else Unwritten() as metrics,
            Interruption() as interruption,
        ):
            if self.step < steps:
                with self._enough_memory():
                    report(estimate(self.objective, self.batches, self.recipe, step=self.step))
            clock = Clock("train", self.step, steps, report)
            while self.step < steps:
                with self._enough_memory():
                    row = self.train_step()
                with self._writing():
                    metrics.record(row)
                clock.advance(self.step, self.tokens_per_step(self.step - 1), row)
                if self._due(run.evaluate_every):
                    ranks.by_first(lambda: self._evaluate(metrics, clock))
                stop = ranks.on_any(interruption.requested)
                if first and (self._due(run.checkpoint_every) or stop):
                    with self._writing():
                        metrics.sync()
                    self.checkpoint()
                if stop and self.step < steps:
                    raise Interrupted(self.folder, self.step)
        return self.folder / BEST

    def train_step(self) -> dict[str, float]:
        """One optimiser step over all its micro-batches; returns the row for the metrics file."""
        began, schedule, step = time.perf_counter(), self.recipe.schedule, self.step
        means = self._gradients(step)
        parameters = list(self.objective.parameters().values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.clip_norm))
        self._refuse_divergence(means["loss"], norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.learning_rate * schedule.learning_rate_factor(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "step": self.step,
            **means,
            "gradient_norm": norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": self.tokens_per_step(step) / (time.perf_counter() - began),
        }

    def _gradients(self, step: int) -> dict[str, float]:
        """Give the parameters their gradients of a step, means over its tokens; returns the loss and its company."""
        schedule = self.recipe.schedule
        sums = dict[str, float]()
        for micro in range(schedule.accumulate):
            batch = self.batches.batch(step * schedule.accumulate + micro, *schedule.shape(step), self.recipe.seed)
            loss = self.objective.loss(batch.to(self.objective.device))
            loss.total.backward()  # type: ignore[no-untyped-call]
            found = {"tokens": loss.tokens, "loss": float(loss.total.detach()), **loss.extra}
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
        joint = torch.tensor(list(sums.values()), dtype=torch.float64)
        ranks.add_up(joint)
        tokens, *values = joint.tolist()
        for parameter in self.objective.parameters().values():
            if parameter.grad is not None:
                # Sums of token losses were added up, so that micro-batches and ranks count by their tokens.
                ranks.add_up(parameter.grad)
                parameter.grad.div_(max(1, tokens))
        return {name: value / max(1, tokens) for name, value in zip(list(sums)[1:], values, strict=True)}

    def tokens_per_step(self, step: int) -> int:
        """Input tokens of an optimiser step, padding included."""
        rows, length = self.recipe.schedule.shape(step)
        return self.recipe.schedule.accumulate * rows * length

    def checkpoint(self) -> None:
        """Save everything the next step depends on."""
        progress = Progress(self.step, self.best, self.recipe.model_dump(mode="json"), self.identity)
        self._refuse_broken_weights()
        with self._writing():
            save_state(self.folder / STATE, self.objective.parameters(), self.optimizer, progress)

    def _evaluate(self, metrics: Metrics, clock: Clock) -> None:
        self._refuse_broken_weights()
        with self._enough_memory():
            figures = self.objective.evaluate()
        row = {"step": self.step, **{f"held_out/{name}": value for name, value in figures.items()}}
        with self._writing():
            metrics.record(row)
            if self.best is None or figures["score"] > self.best:
                self.best = figures["score"]
                self.objective.save(self.folder / BEST, self._provenance(figures))
        clock.note("evaluate", row)

    def _provenance(self, figures: Mapping[str, float]) -> dict[str, object]:
        return training_provenance(self.recipe, self.identity, self.step, figures)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.schedule.steps

    def _refuse_divergence(self, total: float, norm: float) -> None:
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise ConfigError(
                f"step {self.step + 1}: the loss is {total:g} and its gradient {norm:g}; training has diverged. The "
                f"checkpoint in {self.folder} is intact; lower optimizer.learning_rate or lengthen the warm-up"
            )

    def _refuse_broken_weights(self) -> None:
        for name, parameter in self.objective.parameters().items():
            if not torch.isfinite(parameter).all():
                raise ConfigError(
                    f"step {self.step}: {name} is no longer finite; nothing was saved over the checkpoint in "
                    f"{self.folder}. Lower optimizer.learning_rate"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, KangarooError) as error:
            raise CapacityError(
                f"cannot write to {self.folder} after step {self.step}: {error}. The checkpoint saved before is "
                "intact; make room and resume"
            ) from None

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # A GPU's allocator has an exception of its own, the CPU's only a message.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            rows, length = self.recipe.schedule.shape(self.step)
            raise CapacityError(
                f"{rows} sequences of {length} tokens do not fit in memory; lower schedule.batch_sequences and raise "
                "schedule.accumulate by as much: the gradients are the same"
            ) from None
