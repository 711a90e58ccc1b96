"""Drafters: a folder for each family, one line each in DRAFTERS."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kangaroo.drafters import draft_model, none
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.copying import llma, prompt_lookup, rest
from kangaroo.drafters.kangaroo import chain as kangaroo_chain  # a name of its own: `chain` is a module here
from kangaroo.drafters.kangaroo import lookup, tree
from kangaroo.drafters.medusa import drafter as medusa
from kangaroo.drafters.settings import Settings
from kangaroo.errors import ConfigError
from kangaroo.model import Target

MakeDrafter = Callable[[], Drafter]
"""Makes a fresh drafter for each State; weights are loaded once, outside."""


class Entry(NamedTuple):
    """How to make a drafter for a target, its tokenizer (None where there is none) and a user's settings."""

    build: Callable[[Target, Any, Settings], MakeDrafter]
    files: str | None = None
    """The setting that says where what it was trained or built for this target lies."""


DRAFTERS: dict[str, Entry] = {
    "none": Entry(none.build),
    "kangaroo": Entry(kangaroo_chain.build, "adapter"),
    "kangaroo-tree": Entry(tree.build, "adapter"),
    "kangaroo+lookup": Entry(lookup.build, "adapter"),
    "early-exit": Entry(kangaroo_chain.build_early_exit),
    "early-exit-tree": Entry(tree.build_early_exit),
    "medusa": Entry(medusa.build, "heads"),
    "medusa-tree": Entry(medusa.build_tree, "heads"),
    "draft-model": Entry(draft_model.build, "draft_model"),
    "prompt-lookup": Entry(prompt_lookup.build),
    "llma": Entry(llma.build),
    "rest": Entry(rest.build, "datastore"),
}

FILES = tuple(dict.fromkeys(entry.files for entry in DRAFTERS.values() if entry.files))
"""The settings that name what drafters load."""


def find_drafter(name: str) -> Entry:
    """The entry of a drafter. Raises ConfigError for a name that is not in the table."""
    if name not in DRAFTERS:
        raise ConfigError(f"drafter must be one of {', '.join(DRAFTERS)}, got {name!r}")
    return DRAFTERS[name]
