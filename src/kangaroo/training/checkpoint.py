"""Training state on disk: one safetensors file, replaced atomically, holding all that the next step depends on.

A run goes on from it only if it is the same run: recipe, data and target are compared first.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kangaroo.errors import ConfigError, DataError
from kangaroo.files import write_atomically
from kangaroo.inputs import is_file, need_file
from kangaroo.machine import device_name, versions
from kangaroo.training.recipe import Recipe, flatten, parse_recipe


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
        "checksum": tensors_checksum(tensors),
    }
    metadata["facts"] = facts_checksum(metadata)
    write_atomically(path, lambda part: save_file(tensors, part, metadata=metadata))


def read_progress(path: Path) -> Progress:
    """Where the run of a state file stands. Raises DataError if the file is damaged."""
    try:
        with safe_open(need_file(path, "state", DataError), framework="pt") as file:
            metadata = file.metadata() or {}
        kinds = {"step": (int,), "best": (float, int, NoneType), "recipe": (dict, NoneType), "identity": (dict,)}
        if metadata.get("facts", facts_checksum(metadata)) != facts_checksum(metadata):
            raise ValueError("what it says of the run is damaged (checksum)")
        given = {"best": "null", "recipe": "null", "identity": "{}"} | metadata
        found = {name: json.loads(given[name]) for name in kinds}
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        raise DataError(f"cannot resume from {path}: {error}") from None
    for name, allowed in kinds.items():
        if not isinstance(found[name], allowed):
            raise DataError(f"cannot resume from {path}: its {name} is damaged")
    return Progress(**found)


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
    if checksum is not None and checksum != tensors_checksum(tensors):
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


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors on the CPU, by name."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"crc32:{crc:08x}"


def facts_checksum(metadata: Mapping[str, str]) -> str:
    """Of all that a state file says beside its tensors."""
    facts = sorted((name, text) for name, text in metadata.items() if name != "facts")
    return f"crc32:{zlib.crc32(json.dumps(facts).encode()):08x}"


def training_provenance(
    recipe: Recipe, identity: Mapping[str, str], step: int, held_out: Mapping[str, float]
) -> dict[str, Any]:
    """Recipe, digests of data and target, steps trained, the held-out figures then, and versions."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "sha256": dict(identity),
        "steps": step,
        "held_out": dict(held_out),
        "versions": versions(),
        "device": device_name(),
    }


STATE = "state.safetensors"

FREE = frozenset(
    {
        "output",  # the folder was moved
        "states",
        "states_gigabytes",
        "schedule.steps",  # longer or shorter; the decay moves with the end, and what has been learnt stays
        "schedule.decay_steps",  # likewise: a run of unknown length decays when its time comes
        "run.checkpoint_every",
        "run.evaluate_every",
        "run.tensorboard",
        "run.compile",
        "evaluation.batch",
        "regenerate.batch",  # answers do not depend on what they are generated beside
        "synthesis.batch",
    }
)
"""Recipe keys that a resumed run may change."""


def find_progress(recipe: Recipe, identity: Mapping[str, str], *, resume: bool) -> Progress:
    """Where to start: at step 0 in a folder without a run, or with `resume` where the folder's run stopped.

    Raises ConfigError if there is a run and it was not to be resumed, if there is none and it was, or if recipe, data
    or target are not those the run was started with.
    """
    path = recipe.output / STATE
    fresh = Progress(0, None, recipe.model_dump(mode="json"), identity)
    if not is_file(path):
        if resume:
            raise ConfigError(f"nothing to resume: no run has started in {recipe.output}")
        return fresh
    progress = read_progress(path)
    if not resume:
        raise ConfigError(
            f"{recipe.output} holds a run that stopped after step {progress.step}: resume it, choose another output, "
            "or delete the folder"
        )
    _check_same_run(progress, recipe, identity, path)
    return Progress(progress.step, progress.best, fresh.recipe, identity)


def _check_same_run(progress: Progress, recipe: Recipe, identity: Mapping[str, str], path: Path) -> None:
    if progress.recipe is not None:
        if progress.recipe["kind"] != recipe.kind:
            raise ConfigError(f"cannot resume: kind was {progress.recipe['kind']!r}, now it is {recipe.kind!r}")
        # Parsed again, so that a key that did not exist when the run started counts as having had its default.
        old = flatten(parse_recipe(dict(progress.recipe), str(path)).model_dump(mode="json"))
        new = flatten(recipe.model_dump(mode="json"))
        for key in sorted(old.keys() | new.keys()):
            if key not in FREE and old.get(key) != new.get(key):
                raise ConfigError(
                    f"cannot resume: {key} was {old.get(key)!r} when the run started, now it is {new.get(key)!r}; "
                    "restore it, or start a new run in another output folder"
                )
    for name, digest in progress.identity.items():
        if identity.get(name) != digest:
            raise ConfigError(f"cannot resume: the {name} is not the one this run was started with")
    if progress.step > recipe.schedule.steps:
        raise ConfigError(
            f"cannot resume: {progress.step} steps are done, more than schedule.steps = {recipe.schedule.steps}"
        )
