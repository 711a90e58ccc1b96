"""Files that users name: one way to open each kind, and one line for whatever is wrong with it.

Every function takes what the file is to be ("prompt file") and which of the library's errors to raise.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from kangaroo.checks import shown
from kangaroo.errors import KangarooError

Kind = type[KangarooError]
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NOT_FILES = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def name_path(path: Path | str) -> str:
    """A path for an error message; of one that is absurdly long, the two ends."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-150:]}"


def is_folder(path: Path) -> bool:
    """Whether there is such a folder: false for whatever cannot be a path, too."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether there is such a file: false for whatever cannot be a path, too."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def open_file(path: Path, what: str, kind: Kind) -> Iterator[BinaryIO]:
    """A file, open for reading. A pipe is refused instead of waited for."""
    where = name_path(path)
    try:
        handle = os.open(path, _READ)
    except (FileNotFoundError, NotADirectoryError):
        raise kind(f"no {what} at {where}") from None
    except OSError as error:
        raise kind(f"cannot read the {what} at {where}: {error.strerror}") from None
    except ValueError:  # a path with a character that no path may have
        raise kind(f"no {what} at {where!r}: no path can be called so") from None
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            found = next((name for test, name in _NOT_FILES if test(mode)), "no file")
            raise kind(f"no {what} at {where}: that is {found}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def need_file(path: Path, what: str, kind: Kind) -> Path:
    """The path, if there is a file that can be read."""
    with open_file(path, what, kind):
        return path


def read_bytes(path: Path, what: str, kind: Kind) -> bytes:
    """The content of a file."""
    with open_file(path, what, kind) as file:
        try:
            return file.read()
        except OSError as error:
            raise kind(f"cannot read the {what} at {name_path(path)}: {error.strerror}") from None


def read_text(path: Path, what: str, kind: Kind) -> str:
    """The text of a file in UTF-8, its lines ending in newlines, without a byte-order mark."""
    text = decode(read_bytes(path, what, kind), name_path(path), kind)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(content: bytes, where: str, kind: Kind) -> str:
    """Bytes as text in UTF-8, without a byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{where} is not text in UTF-8: byte {content[error.start]:#04x} at place {error.start}") from None


def parse_json(text: str, where: str, kind: Kind, *, nan: bool = False) -> Any:
    """What a JSON text holds: of finite numbers, unless `nan`, and whole characters."""
    try:
        value = json.loads(text, parse_constant=float if nan else _refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise kind(f"{where}: not JSON ({error.msg} at {place})") from None
    except UnicodeEncodeError:
        raise kind(f"{where}: half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except RecursionError:
        raise kind(f"{where}: nested too deep to be read") from None
    except ValueError as error:  # a constant, or a number of thousands of digits
        reason = "a number with too many digits" if "digits" in str(error) else str(error)
        raise kind(f"{where}: {reason}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not a number of JSON")


def read_json(path: Path, what: str, kind: Kind) -> Any:
    """What a JSON file holds."""
    return parse_json(read_text(path, what, kind), f"{name_path(path)} is damaged", kind)


def read_object(path: Path, what: str, kind: Kind) -> dict[str, Any]:
    """The object in a JSON file."""
    value = read_json(path, what, kind)
    if not isinstance(value, dict):
        raise kind(f"{name_path(path)} is damaged: it should hold one object, got {shown(value)}")
    return value
