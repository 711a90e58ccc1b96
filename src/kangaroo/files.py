"""Writing files so that nobody ever sees half of one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary sibling of `path`, then move it into place.

    Readers see the old file or the new one; a crash or a full disk leaves the old one as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb+") as file:  # Windows flushes only what it may write
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Likewise, a text in UTF-8."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Likewise, a value as JSON that can be read by people too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def cache_folder() -> Path:
    """Where this library keeps what can be made again: $KANGAROO_CACHE, or `kangaroo` in the user's cache folder."""
    if named := os.environ.get("KANGAROO_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kangaroo"
