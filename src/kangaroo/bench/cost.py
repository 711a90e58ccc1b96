"""What `kangaroo info` and reports say of a decoder: its sizes, and what its rounds cost."""

from dataclasses import asdict

from pydantic import BaseModel, ConfigDict
from torch import nn

from kangaroo.decoder import Decoder
from kangaroo.drafters.copying.llma import LLMA
from kangaroo.drafters.copying.prompt_lookup import PromptLookup
from kangaroo.drafters.copying.rest import Rest
from kangaroo.drafters.draft_model import DraftModel
from kangaroo.drafters.eagle3.drafter import Eagle3, Eagle3Tree
from kangaroo.drafters.kangaroo.chain import Kangaroo
from kangaroo.drafters.kangaroo.costs import Costs, measure_costs
from kangaroo.drafters.kangaroo.lookup import KangarooLookup
from kangaroo.drafters.kangaroo.tree import KangarooTree
from kangaroo.drafters.medusa.drafter import Medusa, MedusaTree
from kangaroo.linears import count_weights
from kangaroo.model import Target

SELF_DRAFTING = (Kangaroo, KangarooTree, KangarooLookup)
"""What drafts with the target's first layers."""
COPYING = (PromptLookup, LLMA, Rest)
"""What drafts without a model."""


class MethodCosts(BaseModel):
    """What one method's rounds cost, as a run's provenance stores it under `costs`, by the method's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft_share: float | None = None
    """Weights read to draft a token over those of a plain step; 0 for what drafts without a model."""
    measured: Costs | None = None


def decoder_costs(decoder: Decoder, *, nodes: int = 8, repeats: int = 30) -> Costs:
    """The pieces of the decoder's rounds, timed."""
    drafter = decoder.make_drafter()
    model = drafter.model if isinstance(drafter, SELF_DRAFTING) else None
    return measure_costs(decoder.target, model, nodes=nodes, repeats=repeats)


def step_bytes(target: Target) -> int:
    """Bytes of the weights that a plain step reads."""
    return step_weights(target) * int(target.dtype.itemsize)


def step_weights(target: Target) -> int:
    """Weights that a plain step reads: those of all layers and the head."""
    return sum(count_weights(layer) for layer in target.layers) + count_weights(target.head)


def trained_parameters(decoder: Decoder) -> int:
    """Weights that were trained for the decoder's drafter: an adapter's, heads', a head's, a draft model's; else 0."""
    drafter = decoder.make_drafter()
    module: nn.Module | None = None
    if isinstance(drafter, DraftModel):
        return drafter.model.parameters
    if isinstance(drafter, SELF_DRAFTING):
        module = drafter.model.adapter
    elif isinstance(drafter, Medusa | MedusaTree):
        module = drafter.heads
    elif isinstance(drafter, Eagle3 | Eagle3Tree):
        module = drafter.head
    return count_weights(module) if module is not None else 0


def describe(decoder: Decoder) -> dict[str, object]:
    """What `kangaroo info` shows: sizes, exit layer, precision and the cost of drafting."""
    target, drafter = decoder.target, decoder.make_drafter()
    facts: dict[str, object] = {
        "family": target.config.model_type,
        "parameters": target.parameters,
        "layers": target.num_layers,
        "width": target.width,
        "vocabulary": target.vocab_size,
        "context": target.context,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "exactness": asdict(target.exactness),
        "graphs": target.graphs,
        "fingerprint": target.fingerprint,
    }
    trained = trained_parameters(decoder)
    if isinstance(drafter, SELF_DRAFTING):
        facts |= {"exit_layer": drafter.model.exit_layer, "adapter_parameters": trained}
        adapter = drafter.model.adapter
        if adapter is not None:
            facts |= {"adapter_variant": adapter.config.variant, "adapter_layers": adapter.config.layers}
            facts["draft_vocabulary"] = adapter.config.draft_vocabulary or target.vocab_size
    if isinstance(drafter, Medusa | MedusaTree):
        facts["head_parameters"] = trained
    if isinstance(drafter, Eagle3 | Eagle3Tree):
        facts |= {"head_parameters": trained, "features_after_layers": list(drafter.taps)}
        facts["draft_vocabulary"] = drafter.head.config.draft_vocabulary or target.vocab_size
    if isinstance(drafter, DraftModel):
        facts["draft_model_parameters"] = trained
    return facts


def method_costs(decoder: Decoder) -> MethodCosts | None:
    """What the rounds of a decoder's drafter cost: counted, and for a self-drafted chain timed too.

    None where records do not tell how often weights were read to draft: a tree drafts several tokens in one pass.
    """
    drafter = decoder.make_drafter()
    if isinstance(drafter, Kangaroo):
        measured = decoder_costs(decoder, nodes=drafter.nodes)
        return MethodCosts(draft_share=drafter.model.weight_share, measured=measured)
    if isinstance(drafter, Eagle3):  # one pass of the whole head per token, the first of them over what was committed
        return MethodCosts(draft_share=count_weights(drafter.head) / step_weights(decoder.target))
    return MethodCosts(draft_share=0.0) if isinstance(drafter, COPYING) else None
