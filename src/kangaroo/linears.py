"""Linears that give a row the same bits in any company, on plain weights or on packed ones.

A matrix product adds up a row's terms in an order that may depend on how many rows there are. The layers' linears are
therefore replaced by ones that know a `Rows`: in pieces of how many rows they give every row the bits it gets alone.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.kernels import Kernels
from kangaroo.passes import PROMPT_ROWS, Pass, Product, Rows, current

ANY = Rows(sys.maxsize, 1)
"""As many rows as there are: what kernels do that see to it themselves."""
_OF_PROMPTS = Rows(PROMPT_ROWS, PROMPT_ROWS)
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("gate", "up"))
"""Linears of one module that read the same input, by the names that transformers and adapters give them."""
Entry = tuple[nn.Module, str, nn.Linear]
"""A linear, and the module and the name by which it is found."""


class SteadyLinear(nn.Linear):
    """A linear on the weights of another that gives a row the same bits in any company, within `computing`."""

    def __init__(self, linear: nn.Linear, rows: Rows):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.rows = linear.weight, linear.bias, rows
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        return _in_pieces(self._product, x, self.rows)

    def _product(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Packed(Protocol):
    """Weights in the order in which a CPU reads them, with a bias if there is one."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        ...

    def dense(self) -> Tensor:
        """A plain copy of the weights [O, K]."""
        ...


class OneDnnWeights:
    """Weights in the order of oneDNN, which comes with torch."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        with torch.inference_mode(False), torch.no_grad():
            self._held = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 8)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._held, self._bias, "none", [], "")
        return made

    def dense(self) -> Tensor:
        """A plain copy of the weights [O, K]."""
        return self._held.to_dense()  # type: ignore[no-any-return]


def pack(weight: Tensor, bias: Tensor | None, kernels: Kernels | None) -> Packed:
    """Weights [O, K] and a bias [O] for the kernels that were compiled, or for oneDNN's."""
    return OneDnnWeights(weight, bias) if kernels is None else kernels.pack(weight, bias)


class PackedProduct:
    """The weights of linears that read the same input, one below the other, in the order in which a CPU reads them.

    One product over all of them costs less than one over each.
    """

    def __init__(self, linears: Sequence[nn.Linear], rows: Rows | None, kernels: Kernels | None = None):
        self.widths, self.rows = [linear.out_features for linear in linears], rows
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.packed = pack(weight, torch.cat(biases) if biases else None, kernels)
        self._latest: tuple[Tensor, Pass | None, tuple[Tensor, ...]] | None = None

    def weight(self, part: int) -> Tensor:
        """A plain copy of the weights [O, K] of one of the linears."""
        return torch.split(self.packed.dense(), self.widths)[part].clone()

    def part(self, x: Tensor, part: int) -> Tensor:
        """What one of the linears makes of x [..., K]: all are computed for the first that is asked."""
        if len(self.widths) == 1:
            return self(x)
        latest, one = self._latest, current()
        if latest is None or latest[0] is not x or latest[1] is not one:
            latest = (x, one, torch.split(self(x), self.widths, -1))
        self._latest = None if part == len(self.widths) - 1 else latest
        return latest[2][part]

    def __call__(self, x: Tensor) -> Tensor:
        """What all of the linears make of x [..., K], one behind the other."""
        return _in_pieces(self.packed, x, self.rows)


class PackedLinear(nn.Module):
    """One linear of a packed product; no other copy of its weights is kept.

    To all who copy it, read its `weight` or its state it looks like the linear it was made from. No gradient passes.
    """

    def __init__(self, linear: nn.Linear, product: PackedProduct, part: int = 0):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.product, self._part = linear.bias, product, part

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weights [O, K]."""
        return self.product.weight(self._part)

    @property
    def size(self) -> int:
        """How many weights it has, the bias not among them."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        return self.product.part(x, self._part)

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


def _in_pieces(product: Product, x: Tensor, rows: Rows | None) -> Tensor:
    one = current()
    if one is None or rows is None:
        return product(x)
    if one.prompt is not None and rows != ANY:
        rows = _OF_PROMPTS
    count = x.shape[:-1].numel()
    if rows.least <= count <= rows.most:  # the product itself sees rows only, however they are arranged
        return product(x)
    done = rows.apply(product, x.reshape(count, -1))
    return done.view(*x.shape[:-1], -1)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine multiplies with packed weights of this kind at full speed."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def plain_linears(module: nn.Module) -> Iterator[Entry]:
    """Every plain linear within a module: nobody has replaced its `forward`."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and "forward" not in vars(child) and child.weight.device.type != "meta":
                yield parent, name, child


def products(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The linears, those together that are packed together."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        parent, name, linear = entry
        group = next((names for names in _JOINED if name in names), name)
        key = id(parent), group, linear.in_features, linear.bias is None, linear.weight.dtype
        found.setdefault(key, []).append(entry)
    return list(found.values())


def pack_together(product: list[Entry], rows: Rows | None = None, kernels: Kernels | None = None) -> None:
    """Replace linears that read the same input by packed ones."""
    packed = PackedProduct([linear for _, _, linear in product], rows, kernels)
    for part, (parent, name, linear) in enumerate(product):
        setattr(parent, name, PackedLinear(linear, packed, part))


def count_weights(module: nn.Module) -> int:
    """Weights of a module, packed ones included."""
    packed = sum(child.size for child in module.modules() if isinstance(child, PackedLinear))
    return packed + sum(parameter.numel() for parameter in module.parameters())
