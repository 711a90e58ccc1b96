"""A model's own layers in fewer calls: where that changes no bit, or in one call of compiled code.

A step of a small model spends a quarter of its time on starting operators. Llama's layers, and those of its many
relatives, need not turn queries and keys one after the other, nor pass through the modules around them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.attention import attend
from kangaroo.kernels import CompiledLayer, Kernels, LayerParts, PanelWeights, Seen
from kangaroo.linears import PackedLinear
from kangaroo.norms import FusedNorm
from kangaroo.passes import current
from kangaroo.window import cache_argument

_PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""The modules of a layer that is computed here, by the names that transformers gives them."""
ROUNDINGS, ADDITIONS = 4, 64
"""How many roundings of a layer's results may have gone otherwise, and of the sums in single precision behind them."""


class FusedLayer:
    """A layer of Llama's kind within `computing`; anywhere else, the layer itself."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self._layer, self._number, self._past = layer, attention.layer_idx, cache_argument(layer)
        self._head_dim, self._scaling = attention.head_dim, attention.scaling
        self._norm_in, self._norm_mid = layer.input_layernorm, layer.post_attention_layernorm
        self._read = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self._keys = attention.k_proj.out_features // self._head_dim
        self._write, self._activation = attention.o_proj, mlp.act_fn
        self._widen, self._narrow = _joined([mlp.gate_proj, mlp.up_proj]), mlp.down_proj

    def __call__(self, x: Tensor, *, attention_mask: Tensor, position_embeddings: Any, **more: Any) -> Tensor:
        """[B, N, D] -> [B, N, D]; arguments as transformers' layers take them."""
        one, past = current(), more[self._past]
        if one is None or past is None or position_embeddings[0].shape[-1] != self._head_dim:
            more |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            return self._layer(x, **more)  # type: ignore[no-any-return]
        heads = self._read(self._norm_in(x)).view(*x.shape[:2], -1, self._head_dim).transpose(1, 2)
        turned, values = heads[:, : -self._keys], heads[:, -self._keys :]
        turned = _rotate(turned, *position_embeddings)
        queries, keys = turned[:, : -self._keys], turned[:, -self._keys :]
        keys, values = past.update(keys, values, self._number)
        seen = attend(one, queries, keys, values, attention_mask, scaling=self._scaling)
        x = x + self._write(seen.reshape(*x.shape[:2], -1))
        gate, up = self._widen(self._norm_mid(x)).chunk(2, -1)
        narrowed: Tensor = self._narrow(self._activation(gate) * up)
        return x + narrowed


class OneCall:
    """A layer of Llama's kind as compiled code within `computing`; anywhere else, the layer itself."""

    def __init__(self, layer: Any, compiled: CompiledLayer):
        self._layer, self._number, self._past = layer, layer.self_attn.layer_idx, cache_argument(layer)
        self._compiled = compiled

    def __call__(self, x: Tensor, *, attention_mask: Tensor, position_embeddings: Any, **more: Any) -> Tensor:
        """[B, N, D] -> [B, N, D]; arguments as transformers' layers take them."""
        one, past = current(), more[self._past]
        if one is None or past is None:
            more |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            return self._layer(x, **more)  # type: ignore[no-any-return]
        key = "seen", id(attention_mask)
        if key not in one.made:
            where = past.where
            one.made[key] = Seen(where.slots, where.rows, attention_mask, position_embeddings, one.paths)
        return self._compiled(x, one.made[key], *past.storage(self._number))


def compiled_layer(kernels: Kernels, attention: Any, norms: Sequence[Any], mlp: Sequence[Any]) -> CompiledLayer | None:
    """A layer of Llama's kind as one call, from its attention, its norms, and gate, up and down if it has such.

    None if one of them is of another kind, or not of a size that fits.
    """
    read, write = attention.q_proj, attention.o_proj
    dim, inner = attention.head_dim, mlp[0].out_features if mlp else 0
    packed = [getattr(part, "product", None) for part in (read, write, *mlp)]
    fits = all(isinstance(getattr(product, "packed", None), PanelWeights) for product in packed)
    joined = fits and len(packed[0].widths) == 3 and (not mlp or len(packed[2].widths) == 2)  # type: ignore[union-attr]
    if not joined or dim % kernels.lanes or inner % kernels.lanes or not all(isinstance(n, FusedNorm) for n in norms):
        return None
    wide, narrow = (packed[2].packed, packed[4].packed) if mlp else (None, None)  # type: ignore[union-attr]
    parts = LayerParts(
        norms=(norms[0].weight, norms[1].weight if mlp else None),
        epsilon=norms[0].epsilon,
        read=packed[0].packed,  # type: ignore[union-attr]
        write=packed[1].packed,  # type: ignore[union-attr]
        wide=wide,
        narrow=narrow,
        heads=read.out_features // dim,
        stores=attention.k_proj.out_features // dim,
        dim=dim,
        scale=attention.scaling,
    )
    return CompiledLayer(kernels, parts)


def _joined(linears: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """What linears make of one input, one behind the other."""
    first = linears[0]
    if isinstance(first, PackedLinear) and len(first.product.widths) == len(linears):
        return first.product
    return lambda x: torch.cat([linear(x) for linear in linears], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of heads [B, H, N, D], halves turned against each other."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, None] + turned * sin[:, None]


def in_fewer_calls(layer: nn.Module, run: Callable[[Any], Sequence[Tensor]], kernels: Kernels | None) -> Any:
    """The layer fused, if it is of the kind that can be and `run` finds the same bits; else itself.

    With compiled kernels it is one call of them, which rounds less often: `run` must find the same but for rounding.
    """
    for name, parts in _PARTS.items():
        module = layer.get_submodule(name) if name == "" or hasattr(layer, name) else None
        if module is None or {child for child, _ in module.named_children()} != parts or _is_changed(module):
            return layer
    if kernels is not None and (one := _in_one_call(layer, kernels)) and _nearly(run(layer), run(one)):
        return one
    fused = FusedLayer(layer)
    return fused if all(map(torch.equal, run(layer), run(fused))) else layer


def _in_one_call(layer: Any, kernels: Kernels) -> OneCall | None:
    mlp = layer.mlp
    sample = torch.linspace(-8, 8, 64)
    if not torch.allclose(mlp.act_fn(sample), functional.silu(sample)):
        return None
    norms, parts = (layer.input_layernorm, layer.post_attention_layernorm), (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    compiled = compiled_layer(kernels, layer.self_attn, norms, parts)
    return None if compiled is None else OneCall(layer, compiled)


def _nearly(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two results are the same but for a few roundings of each number."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    bound = ROUNDINGS * torch.finfo(ours[0].dtype).eps + ADDITIONS * torch.finfo(torch.float32).eps
    return all((a - b).norm() <= bound * a.norm() for a, b in pairs)


def _is_changed(module: nn.Module) -> bool:
    """Whether a library watches a module or has replaced its `forward`, or it has weights of its own."""
    parts = [module, *module.children()]
    watched = any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)
    return watched or any(True for _ in module.parameters(recurse=False))
