"""The runs of an experiment as points along its axis: pure functions of records and of the recipe they come from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kangaroo.bench.experiment import ExperimentSection
from kangaroo.bench.published import EXPERIMENTS, PublishedPoint
from kangaroo.bench.questions import QuestionId
from kangaroo.bench.records import BASELINE
from kangaroo.bench.report.grid import OVERALL
from kangaroo.bench.report.projection.trace import Trace
from kangaroo.bench.report.results import Run
from kangaroo.bench.report.statistics import Estimate, Summary, ratio
from kangaroo.bench.report.tables import task_name

Place = float | str
"""On the axis."""


@dataclass(frozen=True, slots=True)
class Point:
    """One method in one run, or on one task of it."""

    at: Place
    series: str
    summary: Summary
    compression_rate: Estimate | None
    """None where a method does not tell its rounds."""
    baseline: float
    """Plain decoding's tokens per second on the same questions."""
    parameters: int
    """Weights trained for it; 0 where there are none."""
    published: PublishedPoint | None
    """The paper's figure at the same place."""

    @property
    def gain_per_million(self) -> float | None:
        """Speed-up beyond 1 over millions of trained parameters."""
        return (self.summary.speedup.value - 1) / (self.parameters / 1e6) if self.parameters else None


@dataclass(frozen=True, slots=True)
class Experiment:
    """What a recipe asked, and what came out."""

    about: ExperimentSection
    points: list[Point]
    published: tuple[PublishedPoint, ...]
    """All that the paper has, whether or not there is a point of ours at the place."""
    trace: Trace | None
    """The rounds that are to be projected."""

    @property
    def series(self) -> list[str]:
        """In the order of the recipe."""
        return list(dict.fromkeys(point.series for point in self.points))

    @property
    def sizes_differ(self) -> bool:
        """Whether methods train different numbers of weights, so that the gain per weight says something."""
        return len({point.parameters for point in self.points if point.parameters}) > 1


def make_experiment(runs: Sequence[tuple[Place | None, Run]]) -> Experiment | None:
    """Of a sweep's runs, each with the value of what varies, or of a single run without one.

    None if their recipe has no experiment section.
    """
    recipe = runs[0][1].provenance.get("recipe", {})
    if not recipe.get("experiment"):
        return None
    about = ExperimentSection.model_validate(recipe["experiment"])
    published = tuple(_scaled(EXPERIMENTS[about.published], about.published_scale)) if about.published else ()
    points = [point for value, run in runs for point in _points(run, value, about, published)]
    records = runs[0][1].grid.records.values()
    trace = None if about.projected is None else Trace.of_method(records, about.projected)
    return Experiment(about, points, published, trace)


def _points(
    run: Run, value: Place | None, about: ExperimentSection, published: Sequence[PublishedPoint]
) -> Iterator[Point]:
    methods: dict[str, Mapping[str, Any]] = {method["name"]: method for method in run.provenance["recipe"]["methods"]}
    for name in run.methods:
        said = methods[name]
        tasks = list(run.grid.tasks) if about.by == "task" else [OVERALL]
        for task in tasks:
            own: Place = name if said.get("at") is None else said["at"]
            at = value if value is not None else task_name(task) if about.by == "task" else own
            grouped = value is not None or about.by == "task"
            series = said.get("series") or (name if grouped else said.get("drafter") or name)
            summary = run.summaries[name][task]
            questions = run.grid.questions if task == OVERALL else run.grid.tasks[task]
            yield Point(
                at=at,
                series=series,
                summary=summary,
                compression_rate=_compression_rate(run, name, questions),
                baseline=run.summaries[BASELINE][task].tokens_per_second,
                parameters=run.provenance.get("parameters", {}).get(name, 0),
                published=_beside(at, series, published),
            )


def _scaled(points: Sequence[PublishedPoint], scale: float) -> Iterator[PublishedPoint]:
    for point in points:
        yield point if isinstance(point.at, str) else replace(point, at=point.at * scale)


def _beside(at: Place, series: str, published: Sequence[PublishedPoint]) -> PublishedPoint | None:
    return next((point for point in published if point.at == at and point.series in ("", series)), None)


def _compression_rate(run: Run, method: str, questions: Sequence[QuestionId]) -> Estimate | None:
    """Tokens per round; the interval resamples questions, as that of the speed-up does."""
    turns = [[t for answer in run.grid.answers(method, question) for t in answer.turns] for question in questions]
    counts = np.array([[sum(sum(t.emitted) for t in row), sum(len(t.emitted) for t in row)] for row in turns], float)
    return ratio(counts) if counts[:, 1].any() else None
