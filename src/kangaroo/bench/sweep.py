"""A sweep: one run per value of a key, one after the other, on a model that is loaded once."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kangaroo.bench.journal import claim
from kangaroo.bench.recipe import BenchRecipe
from kangaroo.bench.records import Record
from kangaroo.bench.run import Report, load_methods, measure
from kangaroo.errors import ConfigError, DataError
from kangaroo.files import write_text

SWEEP = "sweep.json"


def run_sweep(
    recipe: BenchRecipe,
    *,
    trained: Mapping[str, Path] | None = None,
    limit: int | None = None,
    watch: Callable[[str], AbstractContextManager[Report]],
) -> dict[str, list[Record]]:
    """Measure a recipe at every value of its [vary] section, as `run_bench` does at one; returns records by value.

    The run of a value lies in OUTPUT/VALUE; sweep.json says which there are. `watch` is entered for each of them, with
    its name, and gives what is told of its progress.
    """
    assert recipe.vary is not None, "run_bench makes a single run"
    runs = recipe.by_value()
    with claim(recipe.output):
        _write_sweep(recipe.output, recipe.vary.key, list(recipe.vary.values))
        methods = load_methods(recipe, trained)
        records = {}
        for value, run in runs.items():
            with watch(f"{recipe.vary.key} = {value}") as report:
                records[value] = measure(run, methods, limit=limit, report=report)
    return records


def _write_sweep(folder: Path, key: str, values: list[Any]) -> None:
    before = read_sweep(folder)
    if before is not None and before[0] != key:
        raise ConfigError(f"{folder} holds a sweep over {before[0]}, not over {key}; give a new --output")
    text = json.dumps({"key": key, "values": values}) + "\n"
    write_text(folder / SWEEP, text)


def read_sweep(folder: Path) -> tuple[str, list[Any]] | None:
    """(key, values) of the sweep in a folder; None if there is none. Raises DataError for a damaged file."""
    path = folder / SWEEP
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return str(table["key"]), list(table["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); run `kangaroo bench` again to renew it") from None
