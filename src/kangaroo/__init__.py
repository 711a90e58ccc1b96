"""Kangaroo: the same text from the same model, faster."""

from kangaroo.decode import Round, decode, start
from kangaroo.decoder import Completion, Decoder, Piece, Stats, load
from kangaroo.drafters import DRAFTERS
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.errors import KangarooError
from kangaroo.hf import custom_generate
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request

__version__ = "0.1.0"
__all__ = [
    "DRAFTERS",
    "Adapter",
    "AdapterConfig",
    "Completion",
    "Decoder",
    "Drafter",
    "KangarooError",
    "Piece",
    "Request",
    "Round",
    "Sampling",
    "Stats",
    "Target",
    "custom_generate",
    "decode",
    "load",
    "start",
]
