"""Kangaroo adapters that the paper's authors trained (Liu et al. 2024): one attention layer and two norms, as a pickle.

The mathematics is this library's own for the variant "kangaroo". The file knows neither its exit layer nor its target.
The authors' code runs every adapter with the rotary embedding and the norms of Vicuna, whatever the target's; here an
adapter is run with those of its target, so the two have to be the same.
"""

from typing import Any

from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.errors import AdapterError
from kangaroo.exchange.checkpoint import Checkpoint, Rope, Table
from kangaroo.model import Target


def make_adapter(found: Checkpoint, target: Target, exit_layer: int) -> tuple[Adapter, list[str]]:
    """(the adapter for this target, in the precision of the checkpoint; what its user should know).

    Raises ConfigError for an exit layer that the target has not got, AdapterError for what belongs to another target or
    is not known here.
    """
    notes = _compare(found.config, target)
    extra = next((name for name in found.tensors if ".mlp." in name), None)
    if extra is not None:
        raise AdapterError(
            f"{found.path}: {extra!r} is of a whole decoder layer; an adapter of this kind is attention and two norms"
        )
    adapter = Adapter(target, AdapterConfig(exit_layer=exit_layer))
    wanted = adapter.state_dict()
    names = {_their_name(name): name for name in wanted}
    tensors = found.matched({theirs: tuple(wanted[own].shape) for theirs, own in names.items()})
    adapter.load_state_dict({own: tensors[theirs] for theirs, own in names.items()})
    return adapter.to(next(iter(tensors.values())).dtype).eval(), notes


def _their_name(own: str) -> str:
    changes = {"layers.0.attention.": "layers.0.self_attn.", "layers.0.norm_in.": "layers.0.input_layernorm."}
    changes["norm_out."] = "norm."
    for mine, theirs in changes.items():
        if own.startswith(mine):
            return theirs + own.removeprefix(mine)
    raise AssertionError(f"an adapter of the paper's kind has no {own}")


def _compare(config: Table, target: Target) -> list[str]:
    """What is worth saying. Raises AdapterError unless the target is of the kind that the adapter was trained for."""
    theirs = Table(target.config.to_dict(), config.where)
    config.refuse({"model_type": "llama", "num_hidden_layers": 1, "attention_bias": False})
    if target.config.model_type != "llama":
        raise AdapterError(f"adapters of this kind are for llama targets, and this one is {target.config.model_type}")
    heads = config.get("num_attention_heads", int)
    sizes: dict[str, Any] = {
        "hidden_size": (config.get("hidden_size", int), target.width),
        "vocab_size": (config.get("vocab_size", int, target.vocab_size), target.vocab_size),
        "num_attention_heads": (heads, theirs.get("num_attention_heads", int)),
        "num_key_value_heads": (
            config.get("num_key_value_heads", int, heads),
            theirs.get("num_key_value_heads", int, heads),
        ),
    }
    for name, (own, wanted) in sizes.items():
        if own != wanted:
            raise AdapterError(f"{config.where}: {name} is {own}, but the target has {wanted}")
    facts = {
        "rotary embedding": (Rope.of(config), Rope.of(theirs)),
        "epsilon of the norms": (config.get("rms_norm_eps", float, 1e-6), theirs.get("rms_norm_eps", float, 1e-6)),
    }
    for name, (own, wanted) in facts.items():
        if own != wanted:
            raise AdapterError(
                f"the adapter was trained with another {name} ({_said(own)}) than the target's ({_said(wanted)}), "
                "which it would be run with here: its drafts would be poor; train one with `kangaroo train --model`"
            )
    seen = config.get("max_position_embeddings", int, 2048)
    if seen < target.context:
        return [f"the adapter has seen texts of up to {seen:,} tokens; the target's context holds {target.context:,}"]
    return []


def _said(value: object) -> str:
    if not isinstance(value, Rope):
        return str(value)
    return f"base {value.base:g}" + ("" if value.kind == "default" else f", {value.kind}, factor {value.factor:g}")
