"""What trained weights come from, as a table that is stored beside them."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kangaroo.training.recipe import Recipe

LIBRARIES = ("kangaroo-decoding", "torch", "transformers", "safetensors")


def provenance(recipe: Recipe, identity: Mapping[str, str], step: int, held_out: Mapping[str, float]) -> dict[str, Any]:
    """Recipe, digests of data and target, steps trained, the held-out figures then, and versions."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "sha256": dict(identity),
        "steps": step,
        "held_out": dict(held_out),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "source"
