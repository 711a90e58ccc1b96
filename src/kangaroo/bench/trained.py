"""Methods that are trained before they are measured: one training for all whose settings are equal.

How to train is not known here: a function is handed in, since measuring and training do not import one another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kangaroo.bench.experiment import TrainingSection
from kangaroo.bench.provenance import digest
from kangaroo.bench.recipe import BenchRecipe, MethodSection
from kangaroo.errors import ConfigError, DataError
from kangaroo.files import claim
from kangaroo.inputs import is_file, need_file
from kangaroo.sealed import read_sealed, write_sealed
from kangaroo.toml import lay_over, read_table

TRAINED, PLAN = "trained", "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training to be done, or to go on with where it was interrupted."""

    recipe: Path
    data: Sequence[Path]
    changes: Mapping[str, Any]
    """Sections and keys of the recipe that take other values, its output folder among them."""
    after: Path | None
    """The folder of the trained adapter that it starts from."""
    beside: Sequence[Path]
    """Folders of the trainings before this one; where the target wrote the same text for them, it need not again."""

    @property
    def folder(self) -> Path:
        """Where it is done."""
        return Path(self.changes["output"])


Train = Callable[[Training], Path]
"""Does it; returns the folder of the best weights."""


def train_methods(
    recipe: BenchRecipe, base: Path, train: Train, check: Callable[[Training], object] = lambda training: None
) -> dict[str, Path]:
    """The folder of what each method of the recipe that has a `train` was trained to, by the method's name.

    `base` is the folder that the recipe's paths are relative to. Trainings lie in OUTPUT/trained, each in a folder
    that is called by the first method it serves; one that is finished is taken as it is. `check` sees
    all trainings before the first begins. Raises ConfigError if a folder holds another training, DataError for data
    that is not there, and what `train` and `check` raise.
    """
    methods = [method for method in recipe.methods if method.train is not None]
    if not methods:
        return {}
    best: dict[str, Path] = {}
    plans: dict[str, dict[str, Any]] = {}
    folders: list[Path] = []
    for method in methods:
        check(_training(method, recipe, base))
    with claim(recipe.output):
        for method in methods:
            assert method.train is not None
            after = None if method.train.after is None else best[method.train.after]
            training = _training(method, recipe, base, after, folders)
            plan = _plan(training)
            twin = next((name for name, other in plans.items() if other == plan), None)
            best[method.name] = _trained(training, plan, train) if twin is None else best[twin]
            plans[method.name] = plan
            folders += [training.folder] if twin is None else []
    return best


def _training(
    method: MethodSection, recipe: BenchRecipe, base: Path, after: Path | None = None, folders: Sequence[Path] = ()
) -> Training:
    assert method.train is not None
    common = recipe.training or TrainingSection()
    path = method.train.recipe or common.recipe
    assert path is not None, "a recipe whose methods are trained says by what"
    changes = method.train.joined(common) | {"output": str(recipe.output / TRAINED / method.name)}
    if common.data and "synthesis" in read_table(base / path, changes):
        changes["synthesis"] = None  # files that are given take the place of what the target would write
    if after is not None:
        lay_over(changes, {"adapter.init": str(after)})
    data = [base / file for file in common.data]
    for file in data:
        need_file(file, "data file (training.data, or --data)", DataError)
    return Training(recipe=base / path, data=data, changes=changes, after=after, beside=list(folders))


def _plan(training: Training) -> dict[str, Any]:
    """All that the weights depend on, but the machine: files by their content, wherever they lie."""
    table = read_table(training.recipe, training.changes)
    del table["output"]
    if training.after is not None:
        table["adapter"]["init"] = digest(training.after)
    return {"recipe": table, "data": [digest(path) for path in training.data]}


def _trained(training: Training, plan: dict[str, Any], train: Train) -> Path:
    folder, path = training.folder, training.folder / PLAN
    if is_file(path):
        found = read_sealed(path, PLAN, DataError)
        best = found.pop("best", None)
        if found != plan:
            raise ConfigError(
                f"{folder} holds a training by another recipe or data; restore it, or give a new --output"
            )
        if best is not None:
            return folder / str(best)
    write_sealed(path, plan)  # first, so that what is interrupted is never gone on with by another plan
    best = train(training)
    write_sealed(path, plan | {"best": str(best.relative_to(folder))})
    return best
