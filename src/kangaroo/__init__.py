"""Kangaroo: the same text from the same model, faster.

Public names are loaded when they are first used: a command line that prints its help needs neither torch nor models.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kangaroo.cache import KVCache, LayerShape
    from kangaroo.completion import Completion, Piece, Stats
    from kangaroo.constraints import Processor
    from kangaroo.decode import Round, decode, start
    from kangaroo.decoder import Decoder, load
    from kangaroo.drafters import DRAFTERS
    from kangaroo.drafters.base import Drafter
    from kangaroo.drafters.copying.llma import LLMAConfig
    from kangaroo.drafters.copying.prompt_lookup import LookupConfig
    from kangaroo.drafters.copying.rest import RestConfig
    from kangaroo.drafters.draft_model import DraftModelConfig
    from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
    from kangaroo.drafters.kangaroo.chain import ChainConfig
    from kangaroo.drafters.kangaroo.lookup import KangarooLookupConfig
    from kangaroo.drafters.kangaroo.tree import TreeConfig
    from kangaroo.drafters.medusa.drafter import MedusaChainConfig, MedusaTreeConfig
    from kangaroo.engine import Engine
    from kangaroo.errors import (
        AdapterError,
        CapacityError,
        ConfigError,
        DataError,
        EngineClosed,
        KangarooError,
        ModelError,
        QueueFull,
    )
    from kangaroo.grammar import Grammar
    from kangaroo.hf import custom_generate
    from kangaroo.logprobs import Logprobs, TokenLogprobs
    from kangaroo.model import Target
    from kangaroo.sampling import Sampling
    from kangaroo.state import Committed, Request, State
    from kangaroo.streaming import AnswerStream, BatchStream
    from kangaroo.tickets import Ticket
    from kangaroo.tree import Draft, Placement, Stop
    from kangaroo.worker import EngineStatus

__version__ = "0.1.0"
__all__ = [
    "DRAFTERS",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "AnswerStream",
    "BatchStream",
    "CapacityError",
    "ChainConfig",
    "Committed",
    "Completion",
    "ConfigError",
    "DataError",
    "Decoder",
    "Draft",
    "DraftModelConfig",
    "Drafter",
    "Engine",
    "EngineClosed",
    "EngineStatus",
    "Grammar",
    "KVCache",
    "KangarooError",
    "KangarooLookupConfig",
    "LLMAConfig",
    "LayerShape",
    "Logprobs",
    "LookupConfig",
    "MedusaChainConfig",
    "MedusaTreeConfig",
    "ModelError",
    "Piece",
    "Placement",
    "Processor",
    "QueueFull",
    "Request",
    "RestConfig",
    "Round",
    "Sampling",
    "State",
    "Stats",
    "Stop",
    "Target",
    "Ticket",
    "TokenLogprobs",
    "TreeConfig",
    "custom_generate",
    "decode",
    "load",
    "start",
]

_PLACES = {
    "cache": ("KVCache", "LayerShape"),
    "completion": ("Completion", "Piece", "Stats"),
    "constraints": ("Processor",),
    "decode": ("Round", "decode", "start"),
    "decoder": ("Decoder", "load"),
    "drafters": ("DRAFTERS",),
    "drafters.base": ("Drafter",),
    "drafters.copying.llma": ("LLMAConfig",),
    "drafters.copying.prompt_lookup": ("LookupConfig",),
    "drafters.copying.rest": ("RestConfig",),
    "drafters.draft_model": ("DraftModelConfig",),
    "drafters.kangaroo.adapter": ("Adapter", "AdapterConfig"),
    "drafters.kangaroo.chain": ("ChainConfig",),
    "drafters.kangaroo.lookup": ("KangarooLookupConfig",),
    "drafters.kangaroo.tree": ("TreeConfig",),
    "drafters.medusa.drafter": ("MedusaChainConfig", "MedusaTreeConfig"),
    "engine": ("Engine",),
    "errors": (
        "AdapterError",
        "CapacityError",
        "ConfigError",
        "DataError",
        "EngineClosed",
        "KangarooError",
        "ModelError",
        "QueueFull",
    ),
    "grammar": ("Grammar",),
    "hf": ("custom_generate",),
    "logprobs": ("Logprobs", "TokenLogprobs"),
    "model": ("Target",),
    "sampling": ("Sampling",),
    "state": ("Committed", "Request", "State"),
    "streaming": ("AnswerStream", "BatchStream"),
    "tickets": ("Ticket",),
    "tree": ("Draft", "Placement", "Stop"),
    "worker": ("EngineStatus",),
}
_HOME = {name: f"kangaroo.{module}" for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kangaroo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A package whose public names win over its modules': `kangaroo.decode` is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):  # importing a module would set it here
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
