"""Ways in which files can be wrong."""

import os
from collections.abc import Callable
from pathlib import Path

Refused = Callable[..., str]
"""Runs a command that must be refused; returns its one line."""
DEEP = "[" * 100_000
DIGITS = "9" * 5000


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def _empty(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


def _below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "below"


BAD_FILES: dict[str, Callable[[Path], Path]] = {
    "missing": lambda folder: folder / "missing",
    "long": lambda folder: folder / ("x" * 5000),
    "deep path": lambda folder: folder / ("x/" * 2500),
    "pipe": _pipe,
    "loop": _loop,
    "folder": _empty,
    "below a file": _below_a_file,
    "device": lambda folder: Path("/dev/zero"),
    "null character": lambda folder: folder / "nu\0ll",
    "surrogate": lambda folder: folder / "\udcff",
}
BAD_JSON = {
    "empty": "",
    "object": "{}",
    "list": "[]",
    "deep": DEEP,
    "deep object": '{"a":' * 100_000,
    "digits": '{"a": ' + DIGITS + "}",
    "nan": '{"width": NaN, "exit_layer": NaN, "after_right": NaN, "hidden_size": NaN}',
    "bytes": "\x00\x01",
    "surrogate": '"\\ud800"',
    "numbers": '{"hidden_size": -1, "vocab_size": 1e999, "model": 5, "version": [], "eos_token_id": "x"}',
}
