"""Drafters: a folder for each family, one line each in DRAFTERS."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from kangaroo.drafters import draft_model, none
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.copying import llma, prompt_lookup, rest
from kangaroo.drafters.eagle3 import drafter as eagle3
from kangaroo.drafters.kangaroo import chain as kangaroo_chain  # a name of its own: `chain` is a module here
from kangaroo.drafters.kangaroo import lookup, tree
from kangaroo.drafters.medusa import drafter as medusa
from kangaroo.drafters.settings import Settings, refuse_unknown
from kangaroo.errors import ConfigError
from kangaroo.model import Target

MakeDrafter = Callable[[], Drafter]
"""Makes a fresh drafter for each State; weights are loaded once, outside."""
Build = Callable[[Target, Any, Settings], MakeDrafter]
"""Prepares a drafter for a target, its tokenizer (None where there is none) and a user's settings."""
DrafterConfig = (
    kangaroo_chain.ChainConfig
    | tree.TreeConfig
    | lookup.KangarooLookupConfig
    | medusa.MedusaChainConfig
    | medusa.MedusaTreeConfig
    | eagle3.Eagle3ChainConfig
    | eagle3.Eagle3TreeConfig
    | draft_model.DraftModelConfig
    | prompt_lookup.LookupConfig
    | llma.LLMAConfig
    | rest.RestConfig
)
DrafterChoice = str | DrafterConfig | Callable[[Target], Drafter]
"""A name in DRAFTERS, a config, or a function that makes a drafter of one's own for a target."""


class Entry(NamedTuple):
    """One drafter of the library."""

    build: Build
    files: str | None = None
    """The setting that says where what it was trained or built for this target lies."""
    config: type | None = None


DRAFTERS: dict[str, Entry] = {
    "none": Entry(none.build),
    "kangaroo": Entry(kangaroo_chain.build, "adapter", kangaroo_chain.ChainConfig),
    "kangaroo-tree": Entry(tree.build, "adapter", tree.TreeConfig),
    "kangaroo+lookup": Entry(lookup.build, "adapter", lookup.KangarooLookupConfig),
    "early-exit": Entry(kangaroo_chain.build_early_exit, None, kangaroo_chain.ChainConfig),
    "early-exit-tree": Entry(tree.build_early_exit, None, tree.TreeConfig),
    "medusa": Entry(medusa.build, "heads", medusa.MedusaChainConfig),
    "medusa-tree": Entry(medusa.build_tree, "heads", medusa.MedusaTreeConfig),
    "eagle3": Entry(eagle3.build, "eagle3", eagle3.Eagle3ChainConfig),
    "eagle3-tree": Entry(eagle3.build_tree, "eagle3", eagle3.Eagle3TreeConfig),
    "draft-model": Entry(draft_model.build, "draft_model", draft_model.DraftModelConfig),
    "prompt-lookup": Entry(prompt_lookup.build, None, prompt_lookup.LookupConfig),
    "llma": Entry(llma.build, None, llma.LLMAConfig),
    "rest": Entry(rest.build, "datastore", rest.RestConfig),
}

FILES = tuple(dict.fromkeys(entry.files for entry in DRAFTERS.values() if entry.files))
"""The settings that name what drafters load."""
OF_ONE_TARGET = {"adapter", "heads", "eagle3"}
"""Those of them that hold weights trained for one target."""


def find_drafter(name: str) -> Entry:
    """The entry of a drafter. Raises ConfigError for a name that is not in the table."""
    if name not in DRAFTERS:
        raise ConfigError(f"drafter must be one of {', '.join(DRAFTERS)}, got {name!r}")
    return DRAFTERS[name]


class Choice(NamedTuple):
    """A drafter that was chosen, ready to be built."""

    name: str
    build: Build
    files: tuple[str, ...]
    settings: Settings

    @property
    def described(self) -> str:
        """Its name, and after a comma what is set."""
        return ", ".join([self.name, *(f"{key}={value}" for key, value in self.settings.items() if value is not None)])


def choose_drafter(drafter: DrafterChoice, settings: Settings) -> Choice:
    """What a user means by a drafter and settings beside it.

    A config of Kangaroo's chain or tree stands for early exit where `exit_layer` is given, which an adapter knows by
    itself. Raises ConfigError for what is no drafter, and for a setting both in a config and beside it.
    """
    if isinstance(drafter, str):
        entry = find_drafter(drafter)
        return Choice(drafter, entry.build, (entry.files,) if entry.files else (), settings)
    if isinstance(drafter, DrafterConfig):
        names = [name for name, entry in DRAFTERS.items() if entry.config is type(drafter)]
        name = names[-1] if "exit_layer" in settings else names[0]
        own = {field.name: getattr(drafter, field.name) for field in fields(drafter)}
        twice = sorted(own.keys() & settings.keys())
        if twice:
            raise ConfigError(f"{twice[0]} is a setting of the config: give it there, {type(drafter).__name__}(...)")
        return choose_drafter(name, own | dict(settings))
    if drafter in {entry.config for entry in DRAFTERS.values()}:
        raise ConfigError(f"drafter must be a config, not its class: write {drafter.__name__}()")
    if not callable(drafter):
        raise ConfigError(
            f"drafter must be a name, a config or a function that makes one for a target, got {drafter!r}"
        )
    return Choice(getattr(drafter, "__name__", type(drafter).__name__), _build_own(drafter), (), settings)


def _build_own(factory: Callable[[Target], Drafter]) -> Build:
    def build(target: Target, tokenizer: Any, settings: Settings) -> MakeDrafter:
        refuse_unknown(settings, ())
        made = factory(target)
        for part in ("taps", "nodes", "cache_layers", "observe", "draft"):
            if not hasattr(made, part):
                raise ConfigError(f"a drafter has {part!r}, but what {factory!r} made has not; see kangaroo.Drafter")
        return lambda: factory(target)

    return build
