"""Drafters: one file each, one line each in DRAFTERS."""

from kangaroo.drafters.base import Drafter
from kangaroo.drafters.kangaroo import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo_tree import KangarooTree, TreeConfig
from kangaroo.drafters.none import NoDrafter

__all__ = ["ChainConfig", "Drafter", "Kangaroo", "KangarooTree", "NoDrafter", "TreeConfig"]
