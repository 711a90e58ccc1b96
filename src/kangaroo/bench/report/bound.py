"""How fast the rounds of a run could have been: the same drafts and the same acceptance, and nothing to pay but passes.

Two prices of a pass. **Weights**: where a pass takes as long as reading its weights, a plain step costs 1, checking a
draft costs 1, and drafting a token costs `draft_share`; a round of k drafted tokens costs 1 + k · draft_share. That
holds for dense models at batch 1. **Passes**: what the pieces of a round took on this machine, each timed alone
(`cost.py`). What lies between the measured speed-up and a bound is software: bookkeeping, launches, waiting. Neither
bound knows of prefill, so both belong beside the speed-up of decoding alone.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from kangaroo.bench.cost import decoder_costs
from kangaroo.bench.report.statistics import Summary
from kangaroo.decoder import Decoder
from kangaroo.drafters.costs import Costs
from kangaroo.drafters.kangaroo import Kangaroo
from kangaroo.drafters.llma import LLMA
from kangaroo.drafters.prompt_lookup import PromptLookup
from kangaroo.drafters.rest import Rest

COPYING = (PromptLookup, LLMA, Rest)
"""What drafts without a model."""


class MethodCosts(BaseModel):
    """What one method's rounds cost, as a run's provenance stores it under `costs`, by the method's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft_share: float | None = None
    """Weights read to draft a token over those of a plain step; 0 for what drafts without a model."""
    measured: Costs | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Speed-ups that a method's rounds could have had; None where their costs are not known."""

    weights: float | None
    passes: float | None


def bounds(summary: Summary, costs: MethodCosts | None) -> Bounds:
    """Of all rounds of a summary."""
    if costs is None or not summary.drafted:
        return Bounds(None, None)
    emitted, drafted = summary.emitted_tokens, summary.drafted_tokens
    weights = None if costs.draft_share is None else emitted / (summary.rounds + costs.draft_share * drafted)
    passes = None if costs.measured is None else costs.measured.bound(list(summary.drafted.elements()), emitted)
    return Bounds(weights, passes)


def method_costs(decoder: Decoder) -> MethodCosts | None:
    """What the rounds of a decoder's drafter cost: counted, and for a self-drafted chain timed too.

    None where records do not tell how often weights were read to draft: a tree drafts several tokens in one pass.
    """
    drafter = decoder.make_drafter()
    if isinstance(drafter, Kangaroo):
        measured = decoder_costs(decoder, nodes=drafter.nodes)
        return MethodCosts(draft_share=drafter.model.weight_share, measured=measured)
    return MethodCosts(draft_share=0.0) if isinstance(drafter, COPYING) else None
