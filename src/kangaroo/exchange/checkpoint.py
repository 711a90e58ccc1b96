"""What another project saved: a folder with a config.json, and weights as safetensors or as a pickle of tensors.

Pickles are read here and nowhere else: by torch's reader that makes tensors and nothing more, because a user has asked
for it by name.
"""

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kangaroo.checks import LARGEST, need_type, shown
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.inputs import is_file, is_folder, name_path, need_file, read_bytes, read_object
from kangaroo.model_files import first_line
from kangaroo.tensors import check_tensors, parse_tensors
from kangaroo.weights import CONFIG, KINDS

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DAMAGE = (
    *(
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        struct.error,
    ),
    zipfile.BadZipFile,
)
"""What torch's reader raises for a file that is not what it should be, beside pickle's own error."""
Value = TypeVar("Value", int, float, bool, str)


@dataclass(frozen=True, slots=True)
class Table:
    """The settings of another project, read one by one; null means that one is not given."""

    values: Mapping[str, Any]
    where: Path

    def get(self, name: str, kind: type[Value], default: Value | None = None) -> Value:
        """A value of this kind; whole numbers are at least 1. Raises AdapterError naming the key."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise AdapterError(f"{self.where} does not say {name!r}, which this kind of checkpoint needs")
        try:
            found = need_type(name, value, kind)
        except ConfigError as error:
            raise AdapterError(f"{self.where}: {error}") from None
        if kind in (int, float) and not 0 < found <= (LARGEST if kind is int else 1e30):
            raise AdapterError(f"{self.where}: {name} must be above 0, got {shown(found)}")
        return found  # type: ignore[no-any-return]

    def table(self, name: str) -> "Table":
        """The settings under a key; none if there is no such key."""
        values = self.values.get(name)
        if values is not None and not isinstance(values, dict):
            raise AdapterError(f"{self.where}: {name} must be an object, got {shown(values)}")
        return Table(values or {}, self.where)

    def refuse(self, switches: Mapping[str, object]) -> None:
        """Raise AdapterError for a setting that changes the arithmetic and is not what it has to be."""
        for name, wanted in switches.items():
            found = self.values.get(name)
            if found is not None and found != wanted:
                raise AdapterError(f"{self.where}: {name} is {shown(found)}; only {wanted!r} is known here")


class Rope(NamedTuple):
    """A rotary embedding, as checkpoints describe theirs."""

    base: float
    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    @classmethod
    def of(cls, table: Table) -> "Rope":
        """From `rope_theta` and `rope_scaling`, or from `rope_parameters`, which holds both. Raises AdapterError."""
        named = table.table("rope_parameters")
        base = named.get("rope_theta", float, table.get("rope_theta", float, 10000.0))
        scaling = named if named.values else table.table("rope_scaling")
        kind = scaling.get("rope_type", str, scaling.get("type", str, "default"))
        if kind == "default":
            return cls(base, kind)
        factor = scaling.get("factor", float)
        if kind == "linear":
            return cls(base, kind, factor)
        if kind != "llama3":
            raise AdapterError(f"{table.where}: rotary embeddings of type {shown(kind)} are not known here")
        low, high = scaling.get("low_freq_factor", float), scaling.get("high_freq_factor", float)
        return cls(base, kind, factor, low, high, scaling.get("original_max_position_embeddings", int))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read: its settings, and its tensors by the names they have there."""

    config: Table
    tensors: dict[str, Tensor]
    path: Path
    """The file of the tensors."""
    sha256: str

    def matched(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] | None = None
    ) -> dict[str, Tensor]:
        """The tensors, if these are their names and shapes, and all of them finite numbers. Raises AdapterError.

        Those in `dtypes` are of the type there, all others numbers of any precision.
        """
        kinds = dtypes or {}
        wanted = {
            name: torch.empty(shape, device="meta", dtype=kinds.get(name, torch.float32))
            for name, shape in shapes.items()
        }
        check_tensors(self.tensors, wanted, self.path)
        return self.tensors


def read_config(folder: Path) -> Table:
    """The config.json of a folder. Raises AdapterError if there is none, or the folder is one of this library's own."""
    own = [name for name in KINDS if is_file(folder / name)]
    if own:
        raise AdapterError(
            f"{name_path(folder)} is a folder of this library already ({KINDS[own[0]]}): use it as it is"
        )
    if not is_folder(folder) or not is_file(folder / CONFIG):
        raise AdapterError(f"nothing to import in {name_path(folder)}: expected a folder with config.json and weights")
    return Table(read_object(folder / CONFIG, CONFIG, AdapterError), folder / CONFIG)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Config and tensors. Raises AdapterError for what is missing, damaged, or holds more than tensors."""
    config = read_config(folder)
    found = [folder / name for name in WEIGHTS if is_file(folder / name)]
    if not found:
        raise AdapterError(f"no weights in {name_path(folder)}: expected {' or '.join(WEIGHTS)}")
    path = found[0]
    if path.suffix == ".safetensors":
        content = read_bytes(path, "weights", AdapterError)
        tensors, sha256 = parse_tensors(content, path), hashlib.sha256(content).hexdigest()
    else:
        tensors, sha256 = _read_pickle(path)
    named = _without_prefix(tensors, path)
    if not named:
        raise AdapterError(f"there are no weights in {path}")
    return Checkpoint(config, named, path, sha256)


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], str]:
    need_file(path, "weights", AdapterError)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd about a damaged file; the error will say enough
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is not None:
            raise AdapterError(f"{path} asks for more than tensors, namely {named[1]}, and is not loaded") from None
        raise AdapterError(f"{path} is damaged, or asks for more than tensors; none of it is loaded") from None
    except DAMAGE as error:
        raise AdapterError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise AdapterError(f"{path} should hold tensors by name, got {shown(found)}")
    odd = next((name for name, value in found.items() if not _is_plain(value)), None)
    if odd is not None:
        raise AdapterError(f"{path}: {shown(odd)} is not a plain tensor, but {type(found[odd]).__name__}")
    return {name: value.detach().contiguous() for name, value in found.items()}, sha256


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _without_prefix(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without the `module.` that training on several devices puts before them, and without rotary tables."""
    named = {name.removeprefix("module."): value for name, value in tensors.items()}
    if len(named) < len(tensors):
        raise AdapterError(f"{path}: some tensors are there twice, with and without 'module.' before their names")
    return {name: value for name, value in named.items() if not name.endswith("rotary_emb.inv_freq")}
