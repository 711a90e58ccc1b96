"""How a pass over some tokens is computed, so that a token's bits do not depend on what else is in the pass.

What differs from machine to machine and from shape to shape is in `Rows` and `Attention`; `parts` and `trial` find out
which will do. It holds within `computing(...)` only: a model run by anybody else computes as it always did.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Product = Callable[[Tensor], Tensor]
PROMPT_ROWS = 64
"""Rows of the pieces that prompts are run in: wide enough to cost no more than a product over all of them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """In pieces of how many rows a product is computed."""

    most: int
    least: int
    """A piece of fewer rows is filled up."""

    def apply(self, product: Product, x: Tensor) -> Tensor:
        """product(x) for x [R, K], piece by piece."""
        rows = x.shape[0]
        if rows > self.most:
            return torch.cat([self.apply(product, piece) for piece in torch.split(x, self.most)])
        if rows >= self.least:
            return product(x)
        # It does not matter what stands beside a row; copies of it take one call.
        alone = rows == 1
        filled = x.expand(self.least, -1).contiguous() if alone else functional.pad(x, (0, 0, 0, self.least - rows))
        return product(filled)[:rows]


@dataclass(frozen=True, slots=True)
class Attention:
    """How attention is computed: in calls of one width, over a multiple of `block` slots."""

    kernel: Literal["sdpa", "math"]
    queries: int
    """Of a call: the heads that share keys and values, token by token, and zeros; more where one token has more."""
    block: int


@dataclass(frozen=True, slots=True)
class Pass:
    """What the parts of a model need to know of the pass they are in."""

    attention: Attention
    prompt: int | None = None
    """Position of the first token, if this is a piece of prompts, which stand at the same positions in all rows."""
    paths: Tensor | None = None
    """[B, N, S] in which slot each node of a tree finds the token at each position before it; None for chains."""
    made: dict[object, Any] = field(default_factory=dict, compare=False)
    """What has been made of masks, for all layers of the pass."""


_current: ContextVar[Pass | None] = ContextVar("pass", default=None)


def current() -> Pass | None:
    """The pass that is being computed; None outside of `computing`."""
    return _current.get()


@contextmanager
def computing(one: Pass | None) -> Iterator[None]:
    """Compute what is inside as one pass; None computes as everybody else does."""
    token = _current.set(one)
    try:
        yield
    finally:
        _current.reset(token)
