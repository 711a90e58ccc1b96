"""The loop: draft, verify, accept, commit. Every drafter, chain or tree, greedy or sampled, runs through it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.accept import RULES, clip
from kangaroo.checks import need_whole
from kangaroo.drafters.base import Drafter
from kangaroo.errors import CapacityError, ConfigError, DataError
from kangaroo.model import Target
from kangaroo.sampling import Sampler
from kangaroo.state import Request, State
from kangaroo.tree import Draft, Placement, Stop, Verdict, place, place_at, place_chain

PREFILL_CHUNK = 512
LARGEST_TREE, LONGEST_DRAFT = 65, 1024
"""Nodes that a tree may have, a column that keeps it from being a chain included; and nodes of any draft."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one pass through the loop did, per row."""

    emitted: list[list[int]]
    """New tokens; the last of a row is the target's own, those before it were drafted and accepted."""
    drafted: list[int]
    """Tokens the drafter proposed, padding not counted."""
    stops: tuple[Stop, ...]
    """Why drafting stopped."""


@torch.inference_mode()
def start(
    target: Target,
    drafter: Drafter,
    requests: Sequence[Request],
    *,
    eos: Sequence[int] = (),
    rule: str = "match",
    capacity: int = 0,
) -> State:
    """Allocate a State for the requests and run their prompts, each but for its last token, which stays pending.

    Rows are as long as the longest request needs, or hold `capacity` tokens if that is more: room for requests that
    will take rows over later.

    Raises DataError for prompts that are empty or leave no room in the context, ConfigError for settings out of range,
    CapacityError if the cache does not fit in memory.
    """
    if rule not in RULES:
        raise ConfigError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    checked = [check_request(request, target) for request in requests]
    if not checked:
        raise DataError("there are no prompts")
    capacity = max(capacity, *(len(r.prompt) + r.max_tokens for r in checked))
    # A chain ends where its row does; trees branch, and may have more nodes than that.
    spare = min(drafter.nodes, max(capacity, LARGEST_TREE), LONGEST_DRAFT)
    try:
        cache = target.new_cache(len(checked), capacity + spare, drafter.cache_layers)
    except CapacityError as error:
        if spare > LARGEST_TREE:
            error.add_note(f"{spare} tokens of each row are for drafts: a smaller max_draft needs fewer")
        raise
    sampler = Sampler([r.sampling for r in checked], target.vocab_size, target.device)
    state = State(checked, cache, sampler, eos, rule, spare=spare)
    prefill(target, drafter, state)
    return state


def check_request(request: Request, target: Target) -> Request:
    """The request with `max_tokens` cut to the context, or the error that it deserves."""
    if len(request.prompt) == 0:
        raise DataError("the prompt is empty: it must hold at least one token")
    need_whole("max_tokens", request.max_tokens, largest=2**63 - 1)
    if request.max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {request.max_tokens}")
    if len(request.prompt) >= target.context:
        raise DataError(f"the prompt has {len(request.prompt)} tokens, but the context holds {target.context}")
    if not 0 <= min(request.prompt) <= max(request.prompt) < target.vocab_size:
        raise DataError(f"the prompt holds token ids outside the vocabulary of {target.vocab_size}")
    room = target.context - len(request.prompt)
    return Request(request.prompt, request.sampling, min(request.max_tokens, room))


@torch.inference_mode()
def prefill(target: Target, drafter: Drafter, state: State, rows: Tensor | None = None) -> None:
    """Run the prompts of `rows` (None: all) in chunks, up to each prompt's last token.

    The drafter sees every prompt from its first token, be it the only one, and so learns that a row has changed hands.
    """
    chosen = torch.arange(state.batch, device=target.device) if rows is None else rows
    longest = max(1, int(state.prompt_lengths[chosen].max()) - 1)
    for begin in range(0, longest, PREFILL_CHUNK):
        width = min(PREFILL_CHUNK, longest - begin)
        positions = torch.arange(begin, begin + width, device=target.device).expand(len(chosen), width)
        where = place_at(positions, begin + width, rows)
        x = target.embed(state.tokens[chosen, begin : begin + width])
        _, features = target.run(x, where, state.cache, taps=drafter.taps)
        drafter.observe(state, state.commit_prompt(begin, width, where, features))


def decode(target: Target, drafter: Drafter, state: State) -> Iterator[Round]:
    """Rounds until every row is done. Between rounds rows may be finished from outside, or given to new requests."""
    while state.active.any():
        yield step(target, drafter, state)


@torch.inference_mode()
def step(target: Target, drafter: Drafter, state: State) -> Round:
    """One round: draft, run the target's remaining layers over the draft, keep what the target agrees with."""
    draft = drafter.draft(state)
    where = place_draft(draft, state)
    x = target.embed(draft.tokens) if draft.hidden is None else draft.hidden
    x, features = target.run(x, where, state.cache, start=draft.layers_done, taps=drafter.taps)
    verdict = RULES[state.rule](draft, target.logits(target.norm(x)), where, state)
    verdict = clip(verdict, draft, state)
    before = state.lengths
    drafter.observe(state, state.commit(draft, verdict, features))
    return _summary(draft, verdict, before, state)


def place_draft(draft: Draft, state: State) -> Placement:
    """Where the nodes of a draft go."""
    nodes = draft.tokens.shape[1]
    if draft.is_chain:
        return place_chain(state.lengths, nodes, state.longest + nodes)
    return place(state.lengths, draft.parents, state.longest + nodes)


def _summary(draft: Draft, verdict: Verdict, before: Tensor, state: State) -> Round:
    first, counts = (before + 1).tolist(), verdict.length.tolist()
    emitted = [state.tokens[row, a : a + n].tolist() for row, (a, n) in enumerate(zip(first, counts, strict=True))]
    drafted = (draft.valid[:, 1:].sum(1) * (verdict.length > 0)).tolist()
    return Round(emitted, drafted, draft.stops)


def collect(rounds: Iterable[Round], rows: int) -> list[list[int]]:
    """The tokens that each row emits in all the rounds, an end-of-sequence token included."""
    texts: list[list[int]] = [[] for _ in range(rows)]
    for done in rounds:
        for text, emitted in zip(texts, done.emitted, strict=True):
            text.extend(emitted)
    return texts
