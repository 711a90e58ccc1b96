"""The self-draft model as a model of its own: a small causal LM of the target's family that any engine can load.

Its layers are the target's first E and the adapter's, its embeddings and its head the target's, its norm the adapter's.
What an adapter lacks of a layer says nothing: a feed-forward network of zeros behind the attention, or the reverse. A
family is exported if its layers have no other parts, and if the copy's logits then equal the drafter's.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterLayer
from kangaroo.errors import ModelError
from kangaroo.fingerprint import is_readable
from kangaroo.loading import end_tokens
from kangaroo.model import PLAIN_DTYPES, Target
from kangaroo.model_files import reading_model
from kangaroo.tree import sequence

ROWS, LENGTH = 2, 64
"""Tokens on which the copy must say what the drafter says."""
QUANTISED_LIMIT = 0.05
"""Mean difference, as a share of the mean logit, that a quantised target's own kernels may make."""
_ADAPTER_PARTS = {
    "self_attn": "attention",
    "input_layernorm": "norm_in",
    "post_attention_layernorm": "norm_mid",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """How a copy's logits compare with the drafter's, over the whole vocabulary and over what may be drafted."""

    tokens: int
    dtype: str
    largest: float
    """The largest difference of two logits; 0 is bit for bit."""
    largest_drafted: float
    """Likewise over the draft vocabulary, against the slice of the head that the drafter itself reads."""

    def in_words(self) -> str:
        """One sentence."""
        over = f"{self.tokens} random tokens, computed in {self.dtype} with eager attention"
        if self.largest:
            return f"its logits differ from the drafter's by {self.largest:.2g} at most on {over}: kernels differ"
        if self.largest_drafted:
            return (
                f"its logits equal those of the drafter's states under the whole head bit for bit on {over}; those of "
                f"the drafter's own slice of the head differ by {self.largest_drafted:.2g} at most"
            )
        return f"its logits equal the drafter's bit for bit on {over}"


def build_standalone(adapter: Adapter) -> PreTrainedModel:
    """The self-draft model of an adapter on its target, in the target's precision, on the CPU: to be saved, not run.

    Raises ModelError for a target whose layers have parts that an adapter's layer has not, or the reverse.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(adapter), dtype=adapter.target.dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(dict(_tensors(adapter, shapes)), assign=True)
    model.tie_weights()
    model.generation_config = _generation(adapter)
    return model.eval().requires_grad_(False)


def load_standalone(folder: Path, target: Target) -> PreTrainedModel:
    """The copy in a folder as transformers loads it, computing as the target does."""
    with reading_model("the exported model", folder):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=target.dtype, attn_implementation=target.config._attn_implementation
        )
    return model.to(target.device)


def prove(adapter: Adapter, model: PreTrainedModel) -> Proof:
    """Compare the logits of a copy, as loaded from where it was written, with the drafter's.

    In the target's precision first; where that is a half and its kernels differ, in single precision.

    Raises ModelError if they differ there too; for a quantised target, if they differ by more than its kernels round.
    """
    target = adapter.target
    proof = _compare(adapter, model)
    if target.hides_weights or proof.largest == proof.largest_drafted == 0:
        return proof
    if target.dtype not in (torch.float32, torch.float64):
        single = Target(copy.deepcopy(target.model).float(), exact=False)
        again = Adapter(single, adapter.config)
        again.load_state_dict(adapter.state_dict())
        proof = _compare(again.float().eval().requires_grad_(False), model.float())
    if proof.largest > 0 or proof.largest_drafted > _rounding(target):
        raise _not_exported(target, f"the copy's logits differ from the drafter's by {proof.largest:.2g}")
    return proof


@torch.inference_mode()
def _compare(adapter: Adapter, model: PreTrainedModel) -> Proof:
    target = adapter.target
    length = min(LENGTH, target.context)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.vocab_size, (ROWS, length), generator=random).to(target.device)
    where = sequence(ROWS, length, target.device)
    x, _ = target.run(target.embed(tokens), where, None, stop=adapter.config.exit_layer)
    y = adapter(x, where)
    whole = target.logits(y) if adapter.head is None else adapter.logits(y)
    got = model(tokens, use_cache=False).logits
    difference = (got - whole).abs()
    share = float(difference.mean(dtype=torch.float64) / whole.abs().mean(dtype=torch.float64))
    if target.hides_weights and not share < QUANTISED_LIMIT:
        raise _not_exported(
            target, f"the copy's logits differ from the quantised drafter's by {share:.2g} of their size"
        )
    drafted = got if adapter.vocabulary is None else got[..., adapter.vocabulary.tokens]
    own = whole if adapter.vocabulary is None else adapter.logits(y)
    return Proof(
        tokens=tokens.numel(),
        dtype=str(target.dtype).removeprefix("torch."),
        largest=float(difference.max()),
        largest_drafted=float((drafted - own).abs().max()),
    )


def _rounding(target: Target) -> float:
    """What a matrix product over a part of the head may differ by from one over the whole."""
    return 1e-4 if target.dtype != torch.float64 else 1e-10


def _config(adapter: Adapter) -> Any:
    target, config = adapter.target, copy.deepcopy(adapter.target.config)
    exit_layer, added = adapter.config.exit_layer, len(adapter.layers)
    config.num_hidden_layers = exit_layer + added
    for name, of_adapter in (("layer_types", target.adapter_kind), ("no_rope_layers", 1)):
        if getattr(config, name, None):
            setattr(config, name, [*getattr(config, name)[:exit_layer], *[of_adapter] * added])
    if adapter.head is not None:
        config.tie_word_embeddings = False
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config._name_or_path, config.dtype = "", target.dtype
    return config


def _generation(adapter: Adapter) -> GenerationConfig:
    """Greedy, as drafts are; and, for transformers, how long a draft is and when it stops."""
    ends, own = end_tokens(adapter.target.model), adapter.target.model.generation_config
    return GenerationConfig(
        bos_token_id=getattr(own, "bos_token_id", None),
        eos_token_id=list(ends) or None,
        pad_token_id=getattr(own, "pad_token_id", None),
        num_assistant_tokens=adapter.config.max_draft,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=adapter.config.threshold,
    )


def _tensors(adapter: Adapter, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The copy's tensors by their names, in the target's precision. `shapes` are those of the family's own."""
    target, first, used = adapter.target, adapter.config.exit_layer, set[str]()
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if ".layers." in name:
            place, _, part = name.partition(".layers.")[2].partition(".")
            if int(place) < first:
                found = read_weight(target.layers[int(place)].get_submodule(part.rpartition(".")[0]), leaf)
            else:
                layer = cast(AdapterLayer, adapter.layers[int(place) - first])
                source = _part_of_adapter(layer, part, target)
                used.add(source)
                own = layer.state_dict().get(source)
                found = torch.full(shape, float("norm" in part)) if own is None else own.clone()  # one may stand twice
        elif module == "lm_head":
            found = read_weight(target.head if adapter.head is None else adapter.head, leaf)
        elif "embed" in module:
            found = read_weight(target.model.get_input_embeddings(), leaf)
        else:
            found = adapter.norm_out.get_parameter(leaf)
        if found.shape != shape:
            raise _not_exported(target, f"{name} has the shape {list(found.shape)}")
        yield name, found.detach().to("cpu", target.dtype).contiguous()
    if unused := {part for layer in adapter.layers for part in layer.state_dict()} - used:
        raise _not_exported(target, f"its layers have no place for the adapter's {min(unused)!r}")


def _part_of_adapter(layer: AdapterLayer, part: str, target: Target) -> str:
    """What an adapter's layer calls a part of a whole layer of the target's family, whether or not it has it."""
    for theirs, ours in _ADAPTER_PARTS.items():
        if part.startswith(f"{theirs}."):
            # The one norm of a layer without attention stands before its feed-forward network.
            ours = "norm_in" if ours == "norm_mid" and layer.attention is None else ours
            return ours + part.removeprefix(theirs)
    raise _not_exported(target, f"its layers have {part!r}, which an adapter's layer has not")


def read_weight(module: nn.Module, leaf: str = "weight") -> Tensor:
    """A parameter of the target; of a quantised linear the matrix [out, in], as what it makes of unit vectors.

    Raises ModelError for weights that are offloaded, or packed in a module that is no linear.
    """
    parameter = dict(module.named_parameters(recurse=False)).get(leaf)
    if parameter is not None and parameter.device.type == "meta":
        raise ModelError("weights that are offloaded to disk cannot be exported; load the model whole")
    if parameter is not None and is_readable(parameter) and parameter.dtype in PLAIN_DTYPES:
        return parameter
    width = getattr(module, "in_features", None)
    if leaf != "weight" or width is None:
        raise ModelError(f"cannot read {leaf!r} of a quantised {type(module).__name__}; export from the plain model")
    device = next(module.parameters()).device
    kinds = [tensor.dtype for tensor in module.parameters() if tensor.dtype in PLAIN_DTYPES]
    units = torch.eye(int(width), dtype=kinds[0] if kinds else torch.bfloat16, device=device)
    with torch.no_grad():
        dense: Tensor = module(units) - module(torch.zeros_like(units[:1]))
    return dense.T


def _not_exported(target: Target, why: str) -> ModelError:
    return ModelError(
        f"a drafter for {target.config.model_type} models cannot be exported as one of them: {why}; it drafts inside "
        "Kangaroo only (llama, mistral, qwen2 and qwen3 models can)"
    )
