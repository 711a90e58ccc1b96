"""How a run tells its caller what it is doing. Nothing here prints."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from kangaroo.training.estimate import Plan, RunEstimate

Stage = Literal["ask", "reply", "write", "answer", "regenerate", "train", "evaluate"]


@dataclass(frozen=True, slots=True)
class Update:
    """A sign of life."""

    stage: Stage
    """Synthesising users' turns, answers to them, or plain text; generating evaluation text; regenerating training
    answers; training; or an evaluation's result."""
    done: int
    """Texts generated, or optimiser steps finished."""
    total: int
    tokens_per_second: float
    """In this stage, since the run was started or resumed."""
    eta: float
    """Seconds until the stage is over, at the rate so far."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """The row just recorded in the metrics file, if one was."""


News = Update | RunEstimate | Plan
TrainingReport = Callable[[News], None]


class Clock:
    """Rates and remaining time of a stage."""

    def __init__(self, stage: Stage, done: int, total: int, report: TrainingReport):
        self._stage, self._first, self._total, self._report = stage, done, total, report
        self._began, self._tokens, self._done = time.perf_counter(), 0, done

    def advance(self, done: int, tokens: int, figures: Mapping[str, float] | None = None) -> None:
        """TrainingReport `done` of the total; `tokens` were processed since the last report."""
        self._done, self._tokens = done, self._tokens + tokens
        self._send(self._stage, figures or {})

    def note(self, stage: Stage, figures: Mapping[str, float]) -> None:
        """TrainingReport something that happened between two steps."""
        self._send(stage, figures)

    def _send(self, stage: Stage, figures: Mapping[str, float]) -> None:
        seconds = max(time.perf_counter() - self._began, 1e-9)
        finished = self._done - self._first
        eta = seconds / finished * (self._total - self._done) if finished else float("inf")
        self._report(Update(stage, self._done, self._total, self._tokens / seconds, eta, figures))
