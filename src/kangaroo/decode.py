"""The loop: draft, verify, accept, commit. Every drafter, chain or tree, greedy or sampled, runs through it."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kangaroo.accept import RULES, clip, emitted_tokens
from kangaroo.checks import need_whole
from kangaroo.constraints import run_processor
from kangaroo.drafters.base import Drafter
from kangaroo.errors import CapacityError, ConfigError, DataError
from kangaroo.logprobs import TokenLogprobs, token_logprobs
from kangaroo.model import Target
from kangaroo.sampling import Sampler, check_bias
from kangaroo.state import Committed, Request, State
from kangaroo.tree import Draft, Placement, Stop, Verdict, place_at

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
    logprobs: list[list[TokenLogprobs]] | None = None
    """Those of the emitted tokens, in the rows that want them; None if no row does."""
    draft_seconds: float = 0.0
    """On an accelerator, until the drafter last waited for it."""
    verify_seconds: float = 0.0
    """All that came after drafting."""


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
    checked = [check_request(request, target, eos) for request in requests]
    if not checked:
        raise DataError("there are no prompts")
    state = allocate(target, drafter, checked, eos=eos, rule=rule, capacity=capacity)
    prefill(target, drafter, state)
    return state


@torch.inference_mode()
def allocate(
    target: Target, drafter: Drafter, requests: Sequence[Request], *, eos: Sequence[int], rule: str, capacity: int
) -> State:
    """A State for checked requests, whose prompts still have to be prefilled. Raises CapacityError."""
    capacity = max(capacity, *(len(r.prompt) + r.max_tokens for r in requests))
    # A chain ends where its row does; trees branch, and may have more nodes than that.
    spare = min(drafter.nodes, max(capacity, LARGEST_TREE), LONGEST_DRAFT)
    try:
        cache = target.new_cache(len(requests), capacity + spare, drafter.cache_layers)
    except CapacityError as error:
        if spare > LARGEST_TREE:
            error.add_note(f"{spare} tokens of each row are for drafts: a smaller max_draft needs fewer")
        raise
    sampler = Sampler([r.sampling for r in requests], target.vocab_size, target.device)
    return State(requests, cache, sampler, eos, rule, spare=spare)


def check_request(request: Request, target: Target, eos: Sequence[int] = ()) -> Request:
    """The request with `max_tokens` cut to the context, or the error that it deserves; `eos` are the model's ends."""
    if len(request.prompt) == 0:
        raise DataError("the prompt is empty: it must hold at least one token")
    for name in ("max_tokens", "min_tokens"):
        need_whole(name, getattr(request, name), largest=2**63 - 1)
    if request.max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {request.max_tokens}")
    if len(request.prompt) >= target.context:
        raise DataError(f"the prompt has {len(request.prompt)} tokens, but the context holds {target.context}")
    if not 0 <= min(request.prompt) <= max(request.prompt) < target.vocab_size:
        raise DataError(f"the prompt holds token ids outside the vocabulary of {target.vocab_size}")
    check_bias(request.sampling, target.vocab_size)
    _check_ends(request, target, eos)
    if request.processor is not None:  # a mistake should not wait for the first round
        kind = torch.float64 if target.dtype == torch.float64 else torch.float32
        scores = torch.zeros(target.vocab_size, dtype=kind, device=target.device)
        run_processor(request.processor, list(request.prompt), [], scores)
    longest = min(request.max_tokens, target.context - len(request.prompt))
    return replace(request, max_tokens=longest, min_tokens=min(request.min_tokens, longest))


def _check_ends(request: Request, target: Target, eos: Sequence[int]) -> None:
    if not 0 <= request.min_tokens <= request.max_tokens:
        raise ConfigError(
            f"min_tokens must be in 0..{request.max_tokens}, which is max_tokens, got {request.min_tokens}"
        )
    outside = [token for token in request.stop_token_ids if not 0 <= token < target.vocab_size]
    if outside:
        raise ConfigError(f"stop_token_ids names token {outside[0]}, but the vocabulary has {target.vocab_size} tokens")
    forbidden = {token for token, bias in request.sampling.logit_bias.items() if bias == -math.inf}
    if request.min_tokens and len(forbidden.union(request.ends(eos))) >= target.vocab_size:
        raise ConfigError(
            f"logit_bias forbids every token but those that end the text, which min_tokens {request.min_tokens} bars: "
            "leave at least one other"
        )


@torch.inference_mode()
def prefill(target: Target, drafter: Drafter, state: State, rows: Tensor | None = None) -> None:
    """Run the prompts of `rows` (None: all) in chunks, up to each prompt's last token.

    The drafter sees every prompt from its first token, be it the only one, and so learns that a row has changed hands.
    """
    seated = state.rows if rows is None else [state.rows[row] for row in rows.tolist()]
    longest = max(1, *(len(row.prompt) - 1 for row in seated))
    for begin in range(0, longest, PREFILL_CHUNK):
        prefill_chunk(target, drafter, state, rows, begin, min(PREFILL_CHUNK, longest - begin))


@torch.inference_mode()
def prefill_chunk(
    target: Target, drafter: Drafter, state: State, rows: Tensor | None, begin: int, width: int
) -> Committed:
    """Run the tokens [begin, begin + width) of the prompts of `rows`, all but each prompt's last."""
    chosen = torch.arange(state.batch, device=target.device) if rows is None else rows
    positions = torch.arange(begin, begin + width, device=target.device).expand(len(chosen), width)
    where = place_at(positions, begin + width, rows, begin, prompt=True)
    x = target.embed(state.tokens[chosen, begin : begin + width])
    _, features = target.run(x, where, state.cache, taps=drafter.taps)
    committed = state.commit_prompt(begin, width, where, features)
    drafter.observe(state, committed)
    return committed


def decode(target: Target, drafter: Drafter, state: State) -> Iterator[Round]:
    """Rounds until every row is done. Between rounds rows may be finished from outside, or given to new requests."""
    while state.running:
        yield step(target, drafter, state)


@torch.inference_mode()
def step(target: Target, drafter: Drafter, state: State) -> Round:
    """One round: draft, run the target's remaining layers over the draft, keep what the target agrees with."""
    began = time.perf_counter()
    draft = drafter.draft(state)
    drafted = time.perf_counter()
    if any(off := state.off):
        draft = _without(draft, off)
    where = place_draft(draft, state)
    x = target.embed(draft.tokens) if draft.hidden is None else draft.hidden
    x, features = target.run(x, where, state.cache, start=draft.layers_done, taps=drafter.taps)
    logits = target.logits(target.norm(x))
    verdict = clip(RULES[state.rule](draft, logits, where, state), draft, state)
    if state.constraints.has_processors and bool((barred := verdict.next_token < 0).any()):
        state.constraints.blamed = int(barred.int().argmax())
        raise ConfigError("a processor forbids every token that could follow; it must leave at least one")
    logprobs = _logprobs(draft, logits, verdict, state)
    committed = state.commit(draft, verdict, features)
    drafter.observe(state, committed)
    done = _summary(committed, state, logprobs)
    return replace(done, draft_seconds=drafted - began, verify_seconds=time.perf_counter() - drafted)


def _logprobs(draft: Draft, logits: Tensor, verdict: Verdict, state: State) -> list[list[TokenLogprobs]] | None:
    """Of what a round is about to emit, from the logits that verified it; None if no row wants any."""
    wanted = [request.logprobs for request in state.requests]
    if not any(wanted):
        return None
    processed: Tensor | None = None
    if any(each is not None and not each.raw for each in wanted):
        processed = state.sampler.scores(logits, state.prefix(draft.tokens, draft.parents))
    emitted, counts = emitted_tokens(verdict, draft), verdict.length.tolist()
    found: list[list[TokenLogprobs]] = [[] for _ in wanted]
    for row, each in enumerate(wanted):
        if each is not None and counts[row]:
            source = logits if each.raw or processed is None else processed
            nodes = verdict.path[row, : counts[row]]
            found[row] = token_logprobs(source[row, nodes], emitted[row, : counts[row]], each.top)
    return found


def _without(draft: Draft, off: Sequence[bool]) -> Draft:
    """The draft, nothing of it in the rows that are off, whatever its drafter thinks of that."""
    valid, off_ = draft.valid.clone(), torch.tensor(off, device=draft.valid.device)
    valid[:, 1:] &= ~off_[:, None]
    stops = zip(off, draft.stops, strict=True)
    return replace(draft, valid=valid, stops=tuple(Stop.OFF if no else stop for no, stop in stops))


def place_draft(draft: Draft, state: State) -> Placement:
    """Where the nodes of a draft go: where its drafter has put them, if it has run layers over them."""
    return draft.where or state.place(draft.tokens.shape[1], None if draft.is_chain else draft.parents)


def _summary(committed: Committed, state: State, logprobs: list[list[TokenLogprobs]] | None) -> Round:
    # What was committed begins with the token that was pending; what is pending now was emitted last.
    rows = zip(committed.text, state.rows, strict=True)
    emitted = [[*text[1:], row.pending] if text else [] for text, row in rows]
    return Round(emitted, list(committed.drafted), committed.stops, logprobs)


def collect(rounds: Iterable[Round], rows: int) -> list[list[int]]:
    """The tokens that each row emits in all the rounds, an end-of-sequence token included."""
    texts: list[list[int]] = [[] for _ in range(rows)]
    for done in rounds:
        for text, emitted in zip(texts, done.emitted, strict=True):
            text.extend(emitted)
    return texts
