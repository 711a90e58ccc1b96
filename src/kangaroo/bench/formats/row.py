"""One line of a questions file, read key by key, with errors that name the line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kangaroo.bench.questions import QuestionId
from kangaroo.documents import are_messages
from kangaroo.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """A JSON object and where it stands. What it lacks, or holds wrongly, raises DataError."""

    values: Mapping[str, Any]
    source: str
    """The file or address."""
    number: int
    """Its line, from 1."""

    @property
    def where(self) -> str:
        """For error messages."""
        return f"{self.source}, line {self.number}"

    def error(self, message: str) -> DataError:
        """An error about this line."""
        return DataError(f"{self.where}: {message}")

    def text(self, key: str) -> str:
        """A string that is not blank."""
        value = self._value(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{key!r} must be a non-empty string, got {_shown(value)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of one or more such strings."""
        value = self._value(key)
        if not isinstance(value, list) or not value or not all(isinstance(x, str) and x.strip() for x in value):
            raise self.error(f"{key!r} must be a non-empty list of non-empty strings, got {_shown(value)}")
        return tuple(value)

    def id(self, key: str) -> QuestionId:
        """A whole number or a string that is not blank."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise self.error(f"{key!r} must be a whole number or a non-empty string, got {_shown(value)}")
        return value

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        """A string from a list."""
        value = self._value(key)
        if value not in known:
            raise self.error(f"unknown {key} {_shown(value)}; it must be one of {', '.join(known)}")
        return str(value)

    def messages(self, key: str) -> tuple[dict[str, str], ...]:
        """A conversation that waits for an answer: {"role", "content"} objects, the last one a user's."""
        value = self._value(key)
        if not are_messages(value) or value[-1]["role"] != "user":
            raise self.error(
                f'{key!r} must be a list of {{"role", "content"}} objects that ends with a user\'s, got {_shown(value)}'
            )
        return tuple(value)

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(f"{key!r} is missing")
        return self.values[key]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
