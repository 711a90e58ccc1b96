"""Reading TOML files into typed settings: tables, overrides, and errors that name the key."""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kangaroo.checks import LARGEST, shown
from kangaroo.errors import ConfigError
from kangaroo.inputs import name_path, read_text

Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of a file: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=BaseModel)
LONGEST_FILE, LONGEST_LINE = 1_000_000, 10_000
"""Characters of a recipe, and of a line of it."""


def read_table(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The table in a file; `overrides` maps dotted keys ("schedule.steps") to values that replace the file's.

    Raises ConfigError for a file that is missing or not TOML.
    """
    text = read_text(path, "recipe", ConfigError)
    _refuse_long_lines(text, name_path(path))
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{name_path(path)} is not a recipe: nested too deep to be read") from None
    except ValueError as error:  # tomllib.TOMLDecodeError, or a number of thousands of digits
        reason = "a number with too many digits" if "digits" in str(error) else str(error)
        raise ConfigError(f"{name_path(path)} is not valid TOML: {reason}") from None
    _refuse_large_numbers(table, name_path(path))
    lay_over(table, overrides or {})
    return table


def _refuse_long_lines(text: str, where: str) -> None:
    """tomllib's time grows with the square of the parts of a dotted key."""
    if len(text) > LONGEST_FILE:
        raise ConfigError(f"{where} is not a recipe: it has {len(text):,} characters, {LONGEST_FILE:,} are the most")
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > LONGEST_LINE:
            raise ConfigError(
                f"{where} is not a recipe: line {number} has {len(line):,} characters, {LONGEST_LINE:,} are the most"
            )


def _refuse_large_numbers(table: dict[str, Any], where: str) -> None:
    """TOML's whole numbers have 64 bits; what reads them would take more."""
    waiting: list[Any] = [table]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{where} is not valid TOML: {shown(value)} does not fit into 64 bits")


def lay_over(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Replace values of a table: keys of `changes` may be dotted, and a section is merged into the one it meets.

    Raises ConfigError for a key that leads through a value.
    """
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        inner = table
        for section in sections:
            inner = _section(inner, section, dotted)
        if isinstance(value, Mapping):
            lay_over(_section(inner, key, dotted), value)
        else:
            inner[key] = value


def parse_table(kind: type[Kind], table: Mapping[str, Any], name: str) -> Kind:
    """The settings in a table; `name` says in errors where it came from.

    Raises ConfigError naming the key, and the nearest known one for a key that does not exist.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error, kind)}") from None


def _section(table: dict[str, Any], name: str, dotted: str) -> dict[str, Any]:
    section = table.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"cannot set {dotted!r}: {name!r} is not a section")
    return section


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    first = error.errors()[0]
    dotted = name_path(".".join(map(str, first["loc"])))
    if first["type"] == "missing":
        return f"{dotted!r} is missing"
    if first["type"] == "value_error":
        return f"{dotted}: {first['ctx']['error']}" if dotted else str(first["ctx"]["error"])
    if first["type"] != "extra_forbidden":
        return f"{dotted}: {first['msg']}, got {shown(first.get('input'))}"
    section = kind
    *path, key = first["loc"]
    for part in path:
        if isinstance(part, str):  # a number is a place in a list of sections
            section = next(_sections(section.model_fields[part].annotation))
    near = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.0)
    return f"unknown key {dotted!r}; did you mean {near[0]!r}?"


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections a field may hold: itself, or behind a union with None or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
