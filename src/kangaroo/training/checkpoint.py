"""Training state on disk: one safetensors file, replaced atomically, holding all that the next step depends on."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kangaroo.errors import ConfigError, DataError
from kangaroo.files import write_atomically


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, and which run it is."""

    step: int
    """Finished steps."""
    best: float | None = None
    """The highest evaluation score so far."""
    recipe: Mapping[str, Any] | None = None
    """The recipe as a table; None in checkpoints from before it was recorded."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Digests of what the run depends on beside the recipe: its data, its target."""


def save_state(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write parameters, optimiser moments and progress; the old file stays until the new one is whole."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    metadata = {
        "step": json.dumps(progress.step),
        "best": json.dumps(progress.best),
        "recipe": json.dumps(progress.recipe),
        "identity": json.dumps(dict(progress.identity)),
        "checksum": _checksum(tensors),
    }
    write_atomically(path, lambda part: save_file(tensors, part, metadata=metadata))


def read_progress(path: Path) -> Progress:
    """Where the run of a state file stands. Raises DataError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return Progress(
            step=int(json.loads(metadata["step"])),
            best=json.loads(metadata.get("best", "null")),
            recipe=json.loads(metadata.get("recipe", "null")),
            identity=json.loads(metadata.get("identity", "{}")),
        )
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(f"cannot resume from {path}: {error}") from None


def load_state(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put saved parameters and moments back, bit for bit.

    Raises DataError if the file is damaged, ConfigError if it holds the state of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            checksum = (file.metadata() or {}).get("checksum")
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot resume from {path}: {error}") from None
    if checksum is not None and checksum != _checksum(tensors):
        raise DataError(f"cannot resume from {path}: its content is damaged (checksum)")
    saved = {name.removeprefix("parameter/"): t.shape for name, t in tensors.items() if name.startswith("parameter/")}
    wanted = {name: parameter.shape for name, parameter in parameters.items()}
    if saved != wanted:
        names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise ConfigError(f"cannot resume from {path}: it holds another model ({names[0]!r} differs)")
    for entry, tensor in tensors.items():
        key, name = entry.split("/", 1)
        if key == "parameter":
            parameters[name].data.copy_(tensor)
        else:
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"crc32:{crc:08x}"
