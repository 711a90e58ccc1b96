"""Writing files so that nobody ever sees half of one, and folders that one process at a time writes to."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from kangaroo.errors import CapacityError, ConfigError, KangarooError
from kangaroo.inputs import name_path

LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary sibling of `path`, then move it into place.

    Readers see the old file or the new one; a crash or a full disk leaves the old one as it was.
    Raises CapacityError for a disk that is full, ConfigError for a place that cannot be written to.
    """
    need_file_or_nothing(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write(temporary)
            with temporary.open("rb+") as file:  # Windows flushes only what it may write
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def need_file_or_nothing(path: Path) -> None:
    """Raise ConfigError for a device, a pipe or a folder: a file moved into its place would put an end to it."""
    with writing(path):
        if path.exists() and not path.is_file():
            raise ConfigError(f"cannot write {name_path(path)}: that is no file; choose another place")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While something is written to a path: a full disk is a CapacityError, whatever else the system says no to a
    ConfigError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise refusal_to_write(path, error) from None
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise ConfigError(f"cannot write to {str(path)!r}: no path can be called so") from None
    except Exception as error:
        # tokenizers raises nothing more special than this where a tokenizer.json cannot be written.
        if type(error) is not Exception:
            raise
        raise refusal_to_write(path, error) from None


def refusal_to_write(path: Path, error: Exception) -> KangarooError:
    """What the system's refusal means to a user."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    # safetensors and tokenizers tell the system's error in words only.
    full = (isinstance(error, OSError) and error.errno in _FULL) or any(f"os error {code})" in reason for code in _FULL)
    if full:
        return CapacityError(f"cannot write {name_path(path)}: {reason}; make room, or write elsewhere")
    return ConfigError(f"cannot write {name_path(path)}: {reason}; choose another place")


def write_text(path: Path, text: str) -> None:
    """Likewise, a text in UTF-8."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Likewise, a value as JSON that can be read by people too."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which is given its name when all is written; if that fails, nothing is left of it.

    Raises ConfigError if there is something there already, or it cannot be written; CapacityError if the disk is full.
    """
    need_new(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        part.mkdir(parents=True)
        try:
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as written:
                        os.fsync(written.fileno())
            if path.exists():
                path.rmdir()
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def need_new(path: Path) -> None:
    """Raise ConfigError unless there is nothing of that name, or an empty folder."""
    with writing(path):
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise ConfigError(f"{name_path(path)} exists and is not an empty folder; give a new --output")


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder, which is made if there is none; released however this one ends.

    A folder that was made, and in which nothing has been written, is gone again afterwards.

    Raises ConfigError if another process has it, or if it cannot be written to.
    """
    with writing(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another process is writing to {name_path(folder)}; wait for it, or give a new --output"
            ) from None
    try:
        yield
    finally:
        if made and folder.is_dir() and [file.name for file in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
        lock.release()


def cache_folder() -> Path:
    """Where this library keeps what can be made again: KANGAROO_CACHE, or `kangaroo` in the user's cache folder."""
    if own := os.environ.get("KANGAROO_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kangaroo"
