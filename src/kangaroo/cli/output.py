"""Standard output, which may be a full disk, a closed pipe, or a terminal that lacks a character; and errors."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kangaroo.errors import CapacityError


class CheckedOutput:
    """A stream that fails with an error of this library's own; a pipe that nobody reads any more is left to typer."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Likewise."""
        with _checked(self._stream):
            return int(self._stream.write(text))

    def flush(self) -> None:
        """Likewise."""
        with _checked(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _checked(stream: Any) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _give_up(stream)
        raise CapacityError(f"cannot write to standard output: {error.strerror}") from None


def _give_up(stream: Any) -> None:
    """What is still buffered goes nowhere, or it would fail once more when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def checked_output() -> Iterator[None]:
    """While entered, standard output is checked; on leaving, everything has been written."""
    plain = sys.stdout
    if isinstance(plain, io.TextIOWrapper):
        plain.reconfigure(errors="backslashreplace")
    sys.stdout = CheckedOutput(plain)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = plain


def print_error(message: str) -> None:
    """One line on standard error; of one that is absurdly long, the two ends."""
    line = " ".join(message.split())
    print("error: " + (line if len(line) <= 1000 else f"{line[:600]} ... {line[-390:]}"), file=sys.stderr)
