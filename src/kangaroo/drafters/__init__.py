"""Drafters: one file each, one line each in DRAFTERS."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kangaroo.adapter import Adapter
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.kangaroo import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo_tree import KangarooTree, TreeConfig
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import ConfigError
from kangaroo.model import Target, check_exit_layer

__all__ = [
    "DRAFTERS",
    "ChainConfig",
    "Drafter",
    "Kangaroo",
    "KangarooTree",
    "MakeDrafter",
    "NoDrafter",
    "TreeConfig",
]

Settings = Mapping[str, Any]
MakeDrafter = Callable[[], Drafter]
"""Makes a fresh drafter for each State; weights are loaded once, outside."""


def _none(target: Target, weights: Path | None, settings: Settings) -> MakeDrafter:
    _configure(dict, settings)
    return NoDrafter


def _kangaroo(target: Target, weights: Path | None, settings: Settings) -> MakeDrafter:
    adapter = _load(target, weights)
    evaluated = {"max_draft": adapter.config.max_draft, "threshold": adapter.config.threshold}
    config = _configure(ChainConfig, evaluated | dict(settings))
    return lambda: Kangaroo(target, adapter, adapter.config.exit_layer, config)


def _kangaroo_tree(target: Target, weights: Path | None, settings: Settings) -> MakeDrafter:
    adapter, config = _load(target, weights), _configure(TreeConfig, settings)
    return lambda: KangarooTree(target, adapter, adapter.config.exit_layer, config)


def _early_exit(target: Target, weights: Path | None, settings: Settings) -> MakeDrafter:
    exit_layer, rest = _exit_layer(target, settings)
    config = _configure(ChainConfig, rest)
    return lambda: Kangaroo(target, None, exit_layer, config)


def _early_exit_tree(target: Target, weights: Path | None, settings: Settings) -> MakeDrafter:
    exit_layer, rest = _exit_layer(target, settings)
    config = _configure(TreeConfig, rest)
    return lambda: KangarooTree(target, None, exit_layer, config)


DRAFTERS: dict[str, Callable[[Target, Path | None, Settings], MakeDrafter]] = {
    "none": _none,
    "kangaroo": _kangaroo,
    "kangaroo-tree": _kangaroo_tree,
    "early-exit": _early_exit,
    "early-exit-tree": _early_exit_tree,
}


def _load(target: Target, weights: Path | None) -> Adapter:
    if weights is None:
        raise ConfigError(
            "this drafter needs an adapter trained for the target: give its folder, train one with `kangaroo train`, "
            "or use drafter 'early-exit', which needs none"
        )
    return Adapter.load(weights, target)


def _exit_layer(target: Target, settings: Settings) -> tuple[int, dict[str, Any]]:
    rest = dict(settings)
    exit_layer = rest.pop("exit_layer", max(1, target.num_layers // 8))
    check_exit_layer(exit_layer, target)
    return exit_layer, rest


def _configure(kind: type[Any], settings: Settings) -> Any:
    known = [] if kind is dict else [field.name for field in fields(kind)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'no settings'}"
            raise ConfigError(f"this drafter has no setting {name!r}; {hint}")
    return kind(**settings)
