"""JSON that notices its own damage: beside what an object holds stands a checksum of it, in files and in lines.

Objects without one come from earlier releases, and are taken as they are.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo.files import write_json
from kangaroo.inputs import Kind, name_path, read_object

SEAL = "crc32"


def seal(table: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum."""
    return {**table, SEAL: _checksum(table)}


def open_sealed(table: Mapping[str, Any], where: str, kind: Kind) -> dict[str, Any]:
    """The object without its checksum. Raises `kind` if its content is not what was written."""
    rest = {name: value for name, value in table.items() if name != SEAL}
    if SEAL in table and table[SEAL] != _checksum(rest):
        raise kind(f"{where} is damaged: its content is not what was written (checksum)")
    return rest


def write_sealed(path: Path, table: Mapping[str, Any]) -> None:
    """Write an object with its checksum to a JSON file, as `write_json` does."""
    write_json(path, seal(table))


def read_sealed(path: Path, what: str, kind: Kind) -> dict[str, Any]:
    """The object in a JSON file. Raises `kind` for what is missing, no object, or damaged."""
    return open_sealed(read_object(path, what, kind), name_path(path), kind)


def _checksum(table: Mapping[str, Any]) -> str:
    """Of the values, however they are spelt: indented or not, in any order."""
    return f"{zlib.crc32(json.dumps(table, sort_keys=True).encode()):08x}"
