"""Runs read back from their folders: summaries, what they come from, and whether two of them may share a report."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from kangaroo.bench.answers import ANSWERS
from kangaroo.bench.cost import MethodCosts
from kangaroo.bench.provenance import PROVENANCE
from kangaroo.bench.questions import QuestionId
from kangaroo.bench.records import BASELINE, read_records, refuse_strangers
from kangaroo.bench.report.bound import Bounds, bounds
from kangaroo.bench.report.counting import AnswerRow, Count, corrected, legacy, read_answers
from kangaroo.bench.report.grid import OVERALL, Grid, arrange
from kangaroo.bench.report.statistics import Summary, summarise
from kangaroo.errors import DataError
from kangaroo.inputs import is_file
from kangaroo.loading import load_tokenizer
from kangaroo.sealed import read_sealed

ALIKE = ("machine", "commit", "dirty", "versions")
"""What must be the same for figures to stand side by side."""


@dataclass(frozen=True, slots=True)
class BothCounts:
    """The same answers as the original's script counts them, and as they should be counted."""

    legacy: Count
    corrected: Count


@dataclass(frozen=True, slots=True)
class Run:
    """One benchmark run."""

    name: str
    grid: Grid
    summaries: dict[str, dict[str, Summary]]
    """By method, the baseline first, and task, OVERALL last."""
    provenance: dict[str, Any]
    costs: dict[str, MethodCosts]
    """By method, where they are known."""
    counts: dict[str, dict[str, BothCounts]]
    """By method and task; empty unless asked for."""
    against: str | None = None
    """A method that all others are compared with, beside the baseline."""

    @property
    def methods(self) -> list[str]:
        """All but the baseline."""
        return [method for method in self.summaries if method != BASELINE]

    @property
    def drawn(self) -> set[str]:
        """Methods that draw by rejection: their texts are not meant to be the baseline's."""
        methods = self.provenance.get("recipe", {}).get("methods", [])
        return {method["name"] for method in methods if method.get("rule", "match") != "match"}

    @property
    def tasks(self) -> list[str]:
        """With OVERALL last, unless there is one task only."""
        return [*self.grid.tasks, OVERALL] if len(self.grid.tasks) > 1 else list(self.grid.tasks)

    @property
    def baseline(self) -> Summary:
        """Plain decoding on all tasks."""
        return self.summaries[BASELINE][OVERALL]

    def overall(self) -> list[Summary]:
        """Every method but the baseline on all tasks."""
        return [self.summaries[method][OVERALL] for method in self.methods]

    def bounds(self, summary: Summary) -> Bounds:
        """How fast the rounds of one of the summaries could have been."""
        return bounds(summary, self.costs.get(summary.method))


def read_runs(folders: Sequence[Path], *, count: bool = False, against: str | None = None) -> list[Run]:
    """Read runs' folders; `count` also counts their answer files in both ways, which needs the models' tokenizers.

    `against` names a method that the others are compared with too. Raises DataError for a folder that is incomplete or
    damaged, or given twice, or without that method; ModelError for a missing tokenizer.
    """
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise DataError(f"{folders[place]} is given twice")
    names = [path.name for path in paths]
    # Folders of one name in different places are called by the whole path.
    shown = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [read_run(path, name, count=count, against=against) for name, path in zip(shown, paths, strict=True)]


def read_run(folder: Path, name: str, *, count: bool = False, against: str | None = None) -> Run:
    """One of them."""
    records, provenance = read_records(folder), read_provenance(folder)
    recipe = provenance.get("recipe", {})
    if methods := recipe.get("methods"):
        refuse_strangers(records, {method["name"] for method in methods}, folder)
    grid = arrange(records)
    if against is not None and against not in grid.methods:
        raise DataError(f"{name} has no method {against!r} to compare with; it has {', '.join(grid.methods)}")
    try:
        costs = TypeAdapter(dict[str, MethodCosts]).validate_python(provenance.get("costs", {}))
    except ValidationError as error:
        raise DataError(f"{folder / PROVENANCE}: costs: {error.errors()[0]['msg']}") from None
    if recipe.get("batch", 1) > 1:
        costs = {}  # they are of one question at a time
    counts = count_answers(folder, grid, str(recipe.get("model", "demo"))) if count else {}
    return Run(name, grid, summarise(grid), provenance, costs, counts, against)


class _Named(BaseModel):
    name: str
    rule: str = "match"


class _Recipe(BaseModel):
    methods: list[_Named] = []
    batch: int = 1


class _Facts(BaseModel):
    """What a report reads of a provenance, as far as it must be of some type."""

    machine: dict[str, Any]
    versions: dict[str, Any]
    commit: str | None
    recipe: _Recipe = _Recipe()
    costs: dict[str, Any] = {}
    resumed: list[dict[str, Any]] = []


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a run comes from. Raises DataError if that was not written down."""
    path = folder / PROVENANCE
    if not is_file(path):
        raise DataError(f"{folder} does not say where its records come from: {PROVENANCE} is missing")
    facts = read_sealed(path, PROVENANCE, DataError)
    missing = [name for name in ALIKE if name not in facts]
    if missing:
        raise DataError(f"{path} does not say the run's {missing[0]}; run `kangaroo bench` again into a new folder")
    try:
        _Facts.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return facts


def count_answers(folder: Path, grid: Grid, model: str) -> dict[str, dict[str, BothCounts]]:
    """Both counts of every method's answer file, by method and task; `model` names the tokenizer's model.

    Raises DataError if the files do not answer the questions of the records.
    """
    tokenizer = load_tokenizer(model)
    rows = {method: _answers(folder / ANSWERS / f"{method}.jsonl", grid) for method in grid.methods}
    plain = rows.pop(BASELINE)

    def both(mine: list[AnswerRow], questions: Sequence[QuestionId]) -> BothCounts:
        # In the order of the files: sums of floats depend on it in their last digits.
        ours, theirs = ([row for row in side if row.question_id in questions] for side in (mine, plain))
        return BothCounts(legacy(ours, theirs, lambda text: tokenizer(text).input_ids), corrected(ours, theirs))

    tasks = {**grid.tasks, OVERALL: grid.questions}
    return {method: {task: both(mine, asked) for task, asked in tasks.items()} for method, mine in rows.items()}


def _answers(path: Path, grid: Grid) -> list[AnswerRow]:
    rows = read_answers(path)
    if {row.question_id for row in rows} != set(grid.questions):
        raise DataError(f"{path} does not answer the questions of the records; run `kangaroo bench` again to renew it")
    return rows


def find_mixture(runs: Sequence[Run]) -> str | None:
    """How runs differ in machine, commit or versions, which forbids comparing them; None if they do not.

    A run that went on at another commit is a mixture by itself.
    """
    first = runs[0]
    for run in runs:
        pairs = [(f"{first.name} and {run.name} differ", first.provenance, run.provenance)]
        pairs += [(f"{run.name} was resumed", run.provenance, later) for later in run.provenance.get("resumed", [])]
        for what, mine, other in pairs:
            for name in ALIKE:
                if name in other and mine[name] != other[name]:
                    return f"{what}: {name} {_difference(mine[name], other[name])}"
    return None


def _difference(mine: Any, other: Any) -> str:
    if isinstance(mine, dict) and isinstance(other, dict):
        key = next(key for key in mine | other if mine.get(key) != other.get(key))
        return f"{key} {_difference(mine.get(key), other.get(key))}"
    return f"{json.dumps(mine)} and {json.dumps(other)}"
