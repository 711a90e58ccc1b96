"""Values that users give: of the right type, and of a size that arithmetic can bear."""

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from kangaroo.errors import ConfigError

LARGEST = 2**31 - 1
"""The largest whole number that a setting may be, unless it says otherwise: sums and products of a few stay exact."""


def shown(value: object) -> str:
    """A value for an error message: whatever it is, on one short line."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of about {value.bit_length() * 3 // 10} digits"
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 120 else f"{text[:80]}...{text[-37:]}"


def counted(count: int, what: str) -> str:
    """How many there are of what has a plain plural: 1 token, 2,000 tokens."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def need_whole(name: str, value: object, *, largest: int = LARGEST) -> int:
    """The value, if it is a whole number from -`largest` - 1 to `largest`. Raises ConfigError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be a whole number, got {shown(value)}")
    number = int(value)
    if not -largest - 1 <= number <= largest:
        raise ConfigError(f"{name} must not be beyond {largest}, got {shown(number)}")
    return number


def need_number(name: str, value: object) -> float:
    """The value, if it is a number. Raises ConfigError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, Integral) and abs(int(value)) > 2**1023:
        raise ConfigError(f"{name} is too large: {shown(int(value))}")
    return float(value)


def need_type(name: str, value: object, annotation: Any, *, largest: int = LARGEST) -> Any:
    """The value as the field annotated so takes it: a whole number where one is meant, a finite number, a switch.

    Raises ConfigError naming the setting.
    """
    kinds: Sequence[Any] = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if value is None and NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    if kind is int:
        return need_whole(name, value, largest=largest)
    if kind is float:
        number = need_number(name, value)
        if math.isnan(number):
            raise ConfigError(f"{name} must be a number, got nan")
        return number
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {shown(value)}")
    elif not isinstance(value, kind):
        wanted = {bool: "true or false", str: "a text"}.get(kind, kind.__name__)
        raise ConfigError(f"{name} must be {wanted}, got {shown(value)}")
    return value
