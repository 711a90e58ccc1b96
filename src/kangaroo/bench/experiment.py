"""What an experiment adds to a benchmark recipe: methods trained first, a key that varies, what it is about."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from kangaroo.bench.published import EXPERIMENTS
from kangaroo.toml import Section, lay_over

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
"""What methods and folders may be called."""
Value = int | float | str
FIXED = frozenset({"model", "dtype", "output", "methods", "training", "vary", "experiment"})
"""Keys that cannot vary within a sweep."""


class TrainingSection(Section):
    """What methods that are trained first have in common."""

    recipe: Path | None = None
    """A training recipe; relative to the folder of the benchmark's."""
    data: tuple[Path, ...] = ()
    """Files to learn from, likewise; none where the target writes the text itself."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the training recipe, dotted, and the values they take instead."""


class TrainSection(Section):
    """What one method is trained by, where that differs."""

    recipe: Path | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    after: str | None = None
    """Start from the adapter that this method, an earlier one, was trained to."""

    def joined(self, common: TrainingSection | None) -> dict[str, Any]:
        """The common changes to the recipe and then this method's own, as one table."""
        table: dict[str, Any] = {}
        for changes in (common.set if common else {}, self.set):
            lay_over(table, changes)
        return table


class VarySection(Section):
    """One run per value of a key, each in a folder of its own that is called by the value."""

    key: str
    """Of the benchmark recipe, dotted."""
    values: tuple[Value, ...] = Field(min_length=1)

    @field_validator("key")
    @classmethod
    def _may_vary(cls, key: str) -> str:
        if key.split(".")[0] in FIXED:
            raise ValueError(f"{key!r} cannot vary: the model is loaded and methods are trained once for all values")
        return key

    @field_validator("values")
    @classmethod
    def _name_folders(cls, values: tuple[Value, ...]) -> tuple[Value, ...]:
        for value in values:
            if not NAME.fullmatch(str(value)):
                raise ValueError(f"a value names a folder: digits, letters and any of ._+-, got {value!r}")
        if len({str(value) for value in values}) < len(values):
            raise ValueError(f"a value is given twice in {list(values)}")
        return values


class ExperimentSection(Section):
    """What a report says of the recipe's figures together, and along which axis."""

    title: str
    axis: str
    """What `at` means: the place of a method, or the value that varies."""
    by: Literal["method", "task"] = "method"
    """A point per method at its place, or per method and task at the task's."""
    published: str | None = None
    """An experiment of the paper to stand beside the figures; `report/published.py` has them."""
    published_scale: float = 1.0
    """The paper's places times this are ours. Its exit layers are shares of the depth: times our number of layers."""
    projected: str | None = None
    """A method whose rounds are projected to other models and machines."""
    note: str = ""

    @field_validator("published")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in EXPERIMENTS:
            raise ValueError(f"published must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
        return name
