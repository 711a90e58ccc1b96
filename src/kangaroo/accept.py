"""Which drafted nodes survive. Pure functions of a draft and the target's logits at its nodes.

`match` keeps a drafted token iff it is the very token the target draws there. `reject` is speculative sampling
(Leviathan et al. 2023, Chen et al. 2023), extended to trees by trying siblings in turn. Both leave the target's
distribution untouched; `match` leaves the text itself untouched.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kangaroo.constraints import NOTHING
from kangaroo.sampling import Stream, best, gumbel
from kangaroo.state import State
from kangaroo.tree import Draft, Placement, Verdict

Rule = Callable[[Draft, Tensor, Placement, State], Verdict]


def match(draft: Draft, logits: Tensor, where: Placement, state: State) -> Verdict:
    """Draw the target's own token at every node; from the root, follow the child that carries it.

    Every emitted token is the target's own draw, so no draft can change the text. logits [B, N, V].
    """
    prefix, positions = state.prefix(draft.tokens, draft.parents), where.positions + 1
    known = state.ahead(1, draft.tokens.shape[1]) if draft.is_chain else None
    if not state.constraints.has_processors:
        return follow(draft, state.sampler.draw(logits, prefix, positions, known=known))
    scores = state.sampler.scores(logits, prefix)
    drawn = best(state.sampler.perturb(scores, positions, known=known))
    return follow(draft, torch.where(scores.amax(-1) > -math.inf, drawn, NOTHING))


def follow(draft: Draft, drawn: Tensor) -> Verdict:
    """The path of drafted tokens that equal the drawn ones [B, N]."""
    if draft.is_chain:
        hits = (draft.tokens[:, 1:] == drawn[:, :-1]) & draft.valid[:, 1:]
        accepted = hits.long().cumprod(1).sum(1)
        path = torch.arange(drawn.shape[1], device=drawn.device).expand_as(drawn)
        return Verdict(path, accepted + 1, drawn.gather(1, accepted[:, None])[:, 0])
    current = torch.zeros_like(drawn[:, 0])
    path_nodes, length = [current], torch.ones_like(current)
    going = torch.ones_like(current, dtype=torch.bool)
    for _ in range(draft.depth):
        wanted = drawn.gather(1, current[:, None])
        hits = (draft.parents == current[:, None]) & (draft.tokens == wanted) & draft.valid
        going = going & hits.any(1)
        current = torch.where(going, hits.int().argmax(1), current)
        length = length + going
        path_nodes.append(current)
    return Verdict(torch.stack(path_nodes, 1), length, drawn.gather(1, current[:, None])[:, 0])


def reject(draft: Draft, logits: Tensor, where: Placement, state: State) -> Verdict:
    """Accept a child x drawn from q with probability min(1, p[x] / q[x]); a refusal leaves norm(max(p - q, 0)).

    Siblings are tried in order against what earlier refusals left of p; drafts without probabilities count as certain
    (q one-hot). Acceptance and residual draws use random streams of their own, keyed by the row's length, so they are
    independent of the draft's and of the other rows.
    """
    prefix = state.prefix(draft.tokens, draft.parents)
    probs = state.sampler.probs(logits, prefix).double()
    if state.constraints.has_processors:
        barred = state.sampler.scores(logits, prefix).amax(-1, keepdim=True) == -math.inf
        probs = probs.masked_fill(barred, math.nan)  # nothing compares with it, so nothing is accepted behind it
    batch, nodes, vocab = probs.shape
    rows = torch.arange(batch, device=probs.device)
    counters = state.round_counters(nodes)
    chances = state.sampler.uniform(counters, Stream.ACCEPT)
    current = torch.zeros(batch, dtype=torch.int64, device=probs.device)
    p, steps = probs[:, 0], [current]
    for i in range(1, nodes):
        token = draft.tokens[:, i]
        q = functional.one_hot(token, vocab).to(p.dtype) if draft.probs is None else draft.probs[:, i].to(p.dtype)
        live = (draft.parents[:, i] == current) & draft.valid[:, i]
        take = live & (chances[:, i] * q[rows, token] < p[rows, token])
        p = torch.where(take[:, None], probs[:, i], torch.where(live[:, None], _residual(p, q), p))
        current = torch.where(take, i, current)
        steps.append(current)
    path, length = _distinct(torch.stack(steps, 1))
    noise = gumbel(state.sampler.keys(counters[:, :1], Stream.RESIDUAL), vocab)
    next_token = best(p.log().clamp_min(-1e300) + noise[:, 0])
    return Verdict(path, length, torch.where(p[:, 0].isnan(), NOTHING, next_token))


def _residual(p: Tensor, q: Tensor) -> Tensor:
    rest = (p - q).clamp_min(0)
    total = rest.sum(-1, keepdim=True)
    # All of p is gone only where p equals q, where a refusal has probability zero but for rounding.
    return torch.where(total > 0, rest / total.clamp_min(math.ulp(0.0)), p)


def _distinct(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Current node after each try [B, N] -> (path [B, N] without repetitions, length [B])."""
    fresh = torch.ones_like(steps, dtype=torch.bool)
    fresh[:, 1:] = steps[:, 1:] != steps[:, :-1]
    order = torch.where(fresh, steps, steps.shape[1]).sort(1).values
    return torch.minimum(order, steps[:, -1:]), fresh.sum(1)


def clip(verdict: Verdict, draft: Draft, state: State) -> Verdict:
    """Cut at the first end-of-sequence token and at the room left; finished rows accept nothing."""
    columns = torch.arange(verdict.path.shape[1], device=verdict.path.device)
    emitted = emitted_tokens(verdict, draft)
    ends = state.is_end(emitted) & (columns < verdict.length[:, None])
    first_end = torch.where(ends, columns + 1, verdict.length[:, None]).amin(1)
    length = torch.minimum(torch.minimum(first_end, verdict.length), state.room)
    length = torch.where(state.active, length, 0)
    last = emitted.gather(1, (length - 1).clamp_min(0)[:, None])[:, 0]
    return Verdict(verdict.path, length, torch.where(state.active, last, draft.tokens[:, 0]))


def emitted_tokens(verdict: Verdict, draft: Draft) -> Tensor:
    """[B, M] what a round emits: drafted tokens, then the target's own; columns past `length` mean nothing."""
    columns = torch.arange(verdict.path.shape[1], device=verdict.path.device)
    tokens = draft.tokens.gather(1, verdict.path)
    shifted = torch.cat([tokens[:, 1:], verdict.next_token[:, None]], 1)
    return torch.where(columns == verdict.length[:, None] - 1, verdict.next_token[:, None], shifted)


RULES: dict[str, Rule] = {"match": match, "reject": reject}
