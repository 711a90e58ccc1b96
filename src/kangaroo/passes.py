"""How a pass over some tokens is computed, so that a token's bits do not depend on what else is in the pass.

A matrix product adds up a row's terms in an order that may depend on how many rows there are. The layers' linears are
therefore replaced by ones that know a `Rows`: in pieces of how many rows they give every row the bits it gets alone.
Which that is differs from machine to machine and from shape to shape; `trial` finds out. What they do holds within
`computing(...)` only: a model run by anybody else computes as it always did.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Product = Callable[[Tensor], Tensor]
PROMPT_ROWS = 64
"""Rows of the pieces that prompts are run in: wide enough to cost no more than a product over all of them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """In pieces of how many rows a product is computed."""

    most: int
    padded: bool
    """Whether the last piece is filled up with zeros, so that all are equally wide."""

    def apply(self, product: Product, x: Tensor) -> Tensor:
        """product(x) for x [R, K], piece by piece."""
        rows = x.shape[0]
        if self.padded and rows % self.most:
            x = functional.pad(x, (0, 0, 0, -rows % self.most))
        if x.shape[0] <= self.most:
            done = product(x)
        else:
            done = torch.cat([product(piece) for piece in torch.split(x, self.most)])
        return done[:rows] if done.shape[0] > rows else done


@dataclass(frozen=True, slots=True)
class Attention:
    """How attention is computed: each query by itself, over a multiple of `block` slots."""

    kernel: Literal["sdpa", "math"]
    queries: int
    """The heads that share keys and values are padded to a multiple of this."""
    block: int


@dataclass(frozen=True, slots=True)
class Pass:
    """What the parts of a model need to know of the pass they are in."""

    attention: Attention
    prompt: int | None = None
    """Position of the first token, if this is a piece of prompts, which stand at the same positions in all rows."""
    paths: Tensor | None = None
    """[B, N, S] in which slot each node of a tree finds the token at each position before it; None for chains."""


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


class SteadyLinear(nn.Linear):
    """A linear on the weights of another that gives a row the same bits in any company, within `computing`."""

    def __init__(self, linear: nn.Linear, rows: Rows):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.rows = linear.weight, linear.bias, rows
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        return _in_pieces(self._product, x, self.rows, self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear whose weights lie in the order in which the CPU's matrix product reads them; no other copy is kept.

    To all who copy it, read its `weight` or its state it looks like the linear it was made from. No gradient passes.
    """

    def __init__(self, linear: nn.Linear, rows: Rows | None):
        super().__init__()
        self.in_features, self.out_features, self.rows = linear.in_features, linear.out_features, rows
        self.bias = linear.bias
        self._packed = pack(linear.weight.detach())

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weights [O, K]."""
        return self._packed.to_dense()

    @property
    def size(self) -> int:
        """How many weights it has, the bias not among them."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        return _in_pieces(self._product, x, self.rows, self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        return packed_product(x, self._packed, self.bias)

    def unpacked(self) -> nn.Linear:
        """The linear it was made from."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        return self.unpacked()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


def _in_pieces(product: Product, x: Tensor, rows: Rows | None, width: int) -> Tensor:
    one = _current.get()
    if one is None or rows is None:
        return product(x)
    if one.prompt is not None:
        rows = _OF_PROMPTS
    flat = x.reshape(-1, x.shape[-1])
    return rows.apply(product, flat).view(*x.shape[:-1], width)


_OF_PROMPTS = Rows(PROMPT_ROWS, padded=True)


def pack(weight: Tensor) -> Tensor:
    """Weights [O, K] in oneDNN's own order."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)  # type: ignore[no-any-return]


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times packed weights -> [..., O]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine multiplies with packed weights of this kind at full speed."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, linear) of every plain linear within a module: nobody has replaced its `forward`."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and "forward" not in vars(child) and child.weight.device.type != "meta":
                yield parent, name, child


def count_weights(module: nn.Module) -> int:
    """Weights of a module, packed ones included."""
    packed = sum(child.size for child in module.modules() if isinstance(child, PackedLinear))
    return packed + sum(parameter.numel() for parameter in module.parameters())
