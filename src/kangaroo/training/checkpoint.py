"""Training state on disk: one safetensors file, replaced atomically, holding all that the next step depends on."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kangaroo.errors import DataError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary sibling of `path`, then move it into place: readers see the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Parameters, optimiser moments and the number of finished steps."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    write_atomically(path, lambda part: save_file(tensors, part, metadata={"step": json.dumps(step)}))


def load_state(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state back, bit for bit; returns the number of finished steps."""
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
            for entry in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                key, name = entry.split("/", 1)
                if key != "parameter":
                    optimizer.state[parameters[name]][key] = file.get_tensor(entry).to(_place(parameters[name], key))
            return int(json.loads(file.metadata()["step"]))
    except (SafetensorError, KeyError, OSError) as error:
        raise DataError(f"cannot resume from {path}: {error}") from None


def _place(parameter: nn.Parameter, key: str) -> torch.device:
    return torch.device("cpu") if key == "step" else parameter.device
