"""How fast the rounds of a run could have been: the same drafts and the same acceptance, and nothing to pay but passes.

Two prices of a pass. **Weights**: where a pass takes as long as reading its weights, a plain step costs 1, checking a
draft costs 1, and drafting a token costs `draft_share`; a round of k drafted tokens costs 1 + k · draft_share. That
holds for dense models at batch 1. **Passes**: what the pieces of a round took on this machine, each timed alone
(`cost.py`). What lies between the measured speed-up and a bound is software: bookkeeping, launches, waiting. Neither
bound knows of prefill, so both belong beside the speed-up of decoding alone.
"""

from dataclasses import dataclass

from kangaroo.bench.cost import MethodCosts
from kangaroo.bench.report.statistics import Summary


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
