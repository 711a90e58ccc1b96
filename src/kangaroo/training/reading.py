"""Reading a training recipe: which kind it is, and what it says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo.errors import ConfigError
from kangaroo.toml import parse_table, read_table
from kangaroo.training.recipe import RECIPES, Recipe


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe; `overrides` maps dotted keys ("schedule.steps") to values that replace the file's.

    Raises ConfigError naming the key, and the nearest known one for a key that does not exist.
    """
    table = read_table(path, overrides)
    if table.get("kind") not in RECIPES:
        raise ConfigError(f"{path}: kind must be one of {', '.join(RECIPES)}, got {table.get('kind')!r}")
    return parse_recipe(table, str(path))


def parse_recipe(table: dict[str, Any], name: str) -> Recipe:
    """The recipe of a table whose `kind` is known; `name` says in errors where it came from."""
    return parse_table(RECIPES[table["kind"]], table, name)
