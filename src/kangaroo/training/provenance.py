"""What trained weights come from, as a table that is stored beside them."""

from collections.abc import Mapping
from typing import Any

from kangaroo.environment import device_name, versions
from kangaroo.training.recipe import Recipe


def provenance(recipe: Recipe, identity: Mapping[str, str], step: int, held_out: Mapping[str, float]) -> dict[str, Any]:
    """Recipe, digests of data and target, steps trained, the held-out figures then, and versions."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "sha256": dict(identity),
        "steps": step,
        "held_out": dict(held_out),
        "versions": versions(),
        "device": device_name(),
    }
