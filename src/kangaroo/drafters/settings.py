"""From the settings a user gives to a drafter's configuration."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from kangaroo.checks import need_type, shown
from kangaroo.errors import ConfigError

Settings = Mapping[str, Any]
Config = TypeVar("Config")


def configure(kind: type[Config], settings: Settings, *, also: tuple[str, ...] = ()) -> Config:
    """A config dataclass from the settings it has fields for; those in `also` are read elsewhere.

    Raises ConfigError for any other name.
    """
    own = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    refuse_unknown(settings, (*own, *also))
    hints = get_type_hints(kind)
    return kind(**{name: need_type(name, value, hints[name]) for name, value in settings.items() if name in own})


def refuse_unknown(settings: Settings, known: tuple[str, ...]) -> None:
    """Raise ConfigError for a setting that a drafter does not have."""
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'no settings'}"
            raise ConfigError(f"this drafter has no setting {name!r}; {hint}")


def need_path(settings: Settings, name: str, advice: str) -> Path:
    """The path that a drafter cannot do without. Raises ConfigError with the advice."""
    if settings.get(name) is None:
        raise ConfigError(f"this drafter needs {name}: {advice}")
    return to_path(name, settings[name])


def to_path(name: str, value: object) -> Path:
    """The setting as a path. Raises ConfigError if it cannot be one."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name} must be a path, got {shown(value)}")
    return Path(value)


def allows_relatives(settings: Settings) -> bool:
    """Whether weights may draft for a relative of the model that they were trained for. Raises ConfigError."""
    allowed: bool = need_type("allow_other_target", settings.get("allow_other_target", False), bool)
    return allowed
