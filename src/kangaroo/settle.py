"""How a target is to be computed: its linears and its attention, chosen by trial, and what can be promised of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from kangaroo.attention import config_of
from kangaroo.cache import LayerShape
from kangaroo.errors import ConfigError, ModelError
from kangaroo.fingerprint import is_readable
from kangaroo.kernels import Kernels
from kangaroo.linears import Entry, SteadyLinear, can_pack, pack_together, plain_linears, products
from kangaroo.parts import find_attention, find_rows, is_even
from kangaroo.passes import Attention, Rows
from kangaroo.trial import Exactness, Tried, attempt, prove
from kangaroo.verdicts import Verdicts


class Settled(Tried, Protocol):
    """What is settled of a target, under the same names."""

    model: PreTrainedModel
    config: Any
    layers: nn.ModuleList
    shapes: list[LayerShape]
    dtype: torch.dtype
    fingerprint: str
    kernels: Kernels | None

    @property
    def head(self) -> nn.Module:
        """The LM head's matrix."""
        ...

    def compute_by(self, way: Attention | None) -> None:
        """Have passes with a cache take their attention this way."""
        ...


def settle(target: Settled, *, exact: bool, pack: bool) -> Exactness:
    """Replace what has to be replaced in the target's model, and say what is promised.

    Raises ModelError if the trial cannot be brought to an end.
    """
    packs = target.kernels is not None or (pack and can_pack(target.dtype, target.device))
    if packs and not all(is_readable(linear.weight) for product in _products(target, packs) for *_, linear in product):
        if target.kernels is not None:
            raise ConfigError("compile packs plain weights, and this model's are quantised; load it without")
        packs = False
    if not exact:
        if packs:
            linears = _products(target, packs)
            _replace(linears, [None] * len(linears), packs, target.kernels)
            target.compute_by(None)
        return Exactness("ties", "not asked for")
    return attempt(lambda: _try(target, packs))


def _try(target: Settled, packs: bool) -> Exactness:
    _need_the_interface(target)
    verdicts = Verdicts(target.device)
    implementation = target.config._attn_implementation
    linears = _products(target, packs)
    kernels = target.kernels
    found = [find_rows([linear for _, _, linear in product], packs, verdicts, kernels) for product in linears]
    stubborn = [product for product, rows in zip(linears, found, strict=True) if rows is None]
    way = find_attention(target.shapes, int(target.config.num_attention_heads), implementation, _more(target), verdicts)
    if stubborn or way is None:
        _replace(linears, [None] * len(linears), packs, kernels)
        target.compute_by(None)
        what = f"linears of shape {tuple(stubborn[0][0][2].weight.shape)}" if stubborn else "attention"
        exactness = Exactness("ties", f"{what}: no way that was tried gives a token the same bits in every pass")
    else:
        _replace(linears, found, packs, kernels)
        target.compute_by(way)
        how = _in_words(packs, [rows for rows in found if rows is not None], way, kernels)
        compiled = "" if kernels is None else f" compiled {kernels.name}"
        name = f"model {target.fingerprint} {target.dtype} {implementation} packed {packs}{compiled}"
        exactness = prove(target, name, verdicts, how)
        if exactness.level == "ties":
            target.compute_by(None)
        elif doubt := _doubt(target, verdicts):  # computed as if exact all the same: most texts will be
            exactness = Exactness("ties", f"{doubt}; {how}")
    trouble = verdicts.save()
    return Exactness(exactness.level, f"{exactness.reason}; {trouble}") if trouble else exactness


def _need_the_interface(target: Settled) -> None:
    for layer in target.layers:
        if config_of(getattr(layer, "self_attn", None)) is not target.config:
            raise ModelError(
                f"{target.config.model_type} models do not take their attention from transformers' interface as they "
                "run, so it cannot be made exact; load with exact=False for the same text up to ties in rounding"
            )


def _products(target: Settled, packs: bool) -> list[list[Entry]]:
    """The linears whose results reach the text, the layers' and the head; those that are packed together together."""
    head = [entry for entry in plain_linears(target.model) if entry[2] is target.head]
    entries = [*plain_linears(target.layers), *head]
    return products(entries) if packs else [[entry] for entry in entries]


def _doubt(target: Settled, verdicts: Verdicts) -> str | None:
    """What the trial of the whole model may have missed, as ordinary numbers seldom show it; None if nothing."""
    short = torch.finfo(target.dtype).bits < 32
    tried = {id(linear.weight) for linear in target.layers.modules() if isinstance(linear, nn.Linear)}
    for name, parameter in target.layers.named_parameters():
        if short and parameter.ndim >= 2 and "norm" not in name and id(parameter) not in tried:
            return f"products with {name.partition('.')[2]} were not tried by themselves, and {target.dtype} hides much"
    width = int(getattr(target.config, "intermediate_size", 0) or 0)
    for name, module in target.layers[0].named_modules():
        activation = "act" in name.rpartition(".")[2] and not list(module.children())
        if activation and width and not is_even(module, width, target.dtype, target.device, verdicts):
            return f"{type(module).__name__} over {width} features depends on the number of rows in its last bits"
    return None


def _replace(found: list[list[Entry]], rows: Sequence[Rows | None], packs: bool, kernels: Kernels | None) -> None:
    for product, own in zip(found, rows, strict=True):
        if packs:
            pack_together(product, own, kernels)
        elif own is not None:
            for parent, name, linear in product:
                setattr(parent, name, SteadyLinear(linear, own))


def _more(target: Settled) -> dict[str, Any]:
    """What the family adds to attention."""
    attention: Any = target.layers[0].self_attn
    more: dict[str, Any] = {}
    if (softcap := getattr(target.config, "attn_logit_softcapping", None)) is not None:
        more["softcap"] = float(softcap)
    if (sinks := getattr(attention, "sinks", None)) is not None:
        more["s_aux"] = torch.zeros_like(sinks)
    return more


def _in_words(packs: bool, rows: list[Rows], way: Attention, kernels: Kernels | None) -> str:
    least = max((one.least for one in rows), default=1)  # none where they have been replaced before
    return ", ".join(
        [
            "compiled linears" if kernels is not None else "packed linears" if packs else "plain linears",
            f"some at least {least} rows wide" if least > 1 else "any number of rows",
            ("attention" if way.kernel == "sdpa" else "attention by hand")
            + (f" {way.queries} queries wide" if way.queries > 1 else " query by query"),
        ]
    )
