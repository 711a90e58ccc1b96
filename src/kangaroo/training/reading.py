"""Reading a recipe: TOML, overrides, and errors that name the key."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kangaroo.errors import ConfigError
from kangaroo.training.recipe import RECIPES, Recipe


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe; `overrides` maps dotted keys ("schedule.steps") to values that replace the file's.

    Raises ConfigError naming the key, and the nearest known one for a key that does not exist.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no recipe at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for dotted, value in (overrides or {}).items():
        _override(table, dotted, value)
    kind = table.get("kind")
    if kind not in RECIPES:
        raise ConfigError(f"{path}: kind must be one of {', '.join(RECIPES)}, got {kind!r}")
    return parse_recipe(table, str(path))


def parse_recipe(table: dict[str, Any], name: str) -> Recipe:
    """The recipe of a table whose `kind` is known; `name` says in errors where it came from."""
    model = RECIPES[table["kind"]]
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error, model)}") from None


def _override(table: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"cannot set {dotted!r}: {section!r} is not a section")
    table[key] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "missing":
        return f"{dotted!r} is missing"
    if first["type"] == "value_error":
        return f"{dotted}: {first['ctx']['error']}" if dotted else str(first["ctx"]["error"])
    if first["type"] != "extra_forbidden":
        return f"{dotted}: {first['msg']}, got {first.get('input')!r}"
    section = model
    for part in path[:-1]:
        section = _section(section, part)
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.0)
    return f"unknown key {dotted!r}; did you mean {near[0]!r}?"


def _section(model: type[BaseModel], field: str) -> type[BaseModel]:
    annotation: Any = model.model_fields[field].annotation
    # An optional section is a union with None.
    candidates = [annotation, *get_args(annotation)]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
