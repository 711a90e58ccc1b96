"""What the drafters do with the target: what they run, when they stop, and what the adapter has seen."""

from collections.abc import Callable

import pytest
import torch

from kangaroo.decode import decode, prefill, start, step
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.chain import Threshold, top_probability
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.drafters.none import NoDrafter
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Committed, Request, State
from kangaroo.tree import Draft, Stop, sequence
from oracle import EVERYTHING, GREEDY
from runs import DRAFTERS, PROMPTS, generate, requests
from tiny import EXIT, LAYERS, build, make_adapter, target

ADAPTER_LAYER = LAYERS  # the cache layer behind the target's own


def chain(model: Target, threshold: float = 0.0, max_draft: int = 3, *, adapter: bool = True) -> Kangaroo:
    return Kangaroo(
        model,
        make_adapter(model, scale=1.0) if adapter else None,
        EXIT,
        ChainConfig(max_draft=max_draft, threshold=threshold),
    )


def tree(model: Target, threshold: float = 0.0, *, top_k: int = 3) -> KangarooTree:
    return KangarooTree(
        model, make_adapter(model, scale=1.0), EXIT, TreeConfig(top_k=top_k, max_draft=3, threshold=threshold)
    )


@torch.inference_mode()
def from_scratch(model: Target, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys of the adapter's layer, draft logits) of one text run in one go."""
    adapter, where = make_adapter(model, scale=1.0), sequence(1, len(tokens))
    cache = model.new_cache(1, len(tokens), adapter.cache_layers)
    x, _ = model.run(model.embed(tokens[None]), where, cache, stop=EXIT)
    logits = adapter.logits(adapter(x, where, cache))
    return cache.read(ADAPTER_LAYER, len(tokens), None)[0][0], logits[0]


# --- what the adapter has seen


class Seldom(Threshold):
    """Drafts in every third round."""

    def begin(self, state: State) -> list[bool]:
        return [state.rounds % 3 == 0] * state.batch


def seldom(model: Target) -> Kangaroo:
    return Kangaroo(model, make_adapter(model, scale=1.0), EXIT, ChainConfig(max_draft=2), Seldom(0.0))


@pytest.mark.parametrize("make", [chain, tree, seldom], ids=["chain", "tree", "seldom"])
@torch.inference_mode()
def test_the_adapter_has_seen_every_committed_token_in_its_place(make: Callable[[Target], Drafter]) -> None:
    """After full acceptance and after none, in every row, and after rows have changed hands."""
    model = target("llama")
    drafter = make(model)
    state = start(
        model, drafter, [Request(p, EVERYTHING, n) for p, n in zip(PROMPTS, (6, 30, 9), strict=True)], capacity=40
    )
    newcomers = [[4], [9] * 12, [8, 8, 9], [7] * 25]
    held: set[int] = set()  # how many accepted tokens were waiting for the adapter when a draft began
    while bool(state.active.any()):
        waiting = drafter.model._unseen  # type: ignore[attr-defined]
        held.add(sum(states.shape[1] for states, _ in waiting))
        drafted = drafter.draft(state).depth > 0
        for row in range(state.batch):
            length = int(state.lengths[row])
            if state.active[row] and drafted:
                got = state.cache.read(ADAPTER_LAYER, length, None)[0][row]
                want, _ = from_scratch(model, state.tokens[row, : length + 1])
                assert torch.allclose(got, want[:, :length], rtol=1e-5, atol=1e-6)
        step(model, drafter, state)
        for row in (~state.active).nonzero()[:, 0].tolist():
            if newcomers:
                state.assign(row, Request(newcomers.pop(), EVERYTHING, 8))
                prefill(model, drafter, state, rows=torch.tensor([row]))
    assert not newcomers
    assert held >= {0, 1}


# --- what is drafted


@torch.inference_mode()
def test_a_greedy_chain_holds_the_best_tokens_of_the_self_draft_model() -> None:
    model = target("llama")
    drafter = chain(model)
    state = start(model, drafter, requests(PROMPTS, GREEDY, 20))
    for _ in range(4):
        draft = drafter.draft(state)
        for row in range(3):
            text = torch.cat([state.tokens[row, : state.lengths[row]], draft.tokens[row]])
            _, logits = from_scratch(model, text)
            assert draft.tokens[row, 1:].tolist() == logits[state.lengths[row] : -1].argmax(-1).tolist()
        step(model, drafter, state)


@torch.inference_mode()
def test_hidden_states_are_the_targets_own_after_the_exit_layer() -> None:
    model = target("mistral")
    for drafter in (chain(model), tree(model), chain(model, adapter=False)):
        state = start(model, drafter, requests(PROMPTS, GREEDY, 20))
        draft = drafter.draft(state)
        assert draft.layers_done == EXIT
        assert draft.hidden is not None
        for row in range(3):
            for node in range(draft.tokens.shape[1]):
                path = path_to(draft, row, node)
                text = torch.cat([state.tokens[row, : state.lengths[row]], draft.tokens[row, path]])
                x, _ = model.run(model.embed(text[None]), sequence(1, len(text)), None, stop=EXIT)
                assert torch.allclose(draft.hidden[row, node], x[0, -1], rtol=1e-5, atol=1e-5)


def path_to(draft: Draft, row: int, node: int) -> list[int]:
    return [*path_to(draft, row, int(draft.parents[row, node])), node] if node >= 0 else []


@torch.inference_mode()
def test_each_row_stops_after_its_own_first_unsure_token_which_stays_in_the_draft() -> None:
    model, threshold = target("llama"), 0.3
    drafter = chain(model, threshold, max_draft=5)
    state, seen = start(model, drafter, requests(PROMPTS, GREEDY, 30)), set()
    for _ in range(8):
        draft, reasons = drafter.draft(state), list[Stop]()
        for row in range(3):
            drafted = int(draft.valid[row, 1:].sum())
            assert draft.valid[row, : drafted + 1].all()
            text = torch.cat([state.tokens[row, : state.lengths[row]], draft.tokens[row, : drafted + 1]])
            sure = top_probability(from_scratch(model, text)[1])[state.lengths[row] : -1] >= threshold
            assert sure[:-1].all()
            reasons.append(Stop.CONFIDENCE if not sure[-1] else Stop.LENGTH)
            assert drafted == 5 or not sure[-1]
            seen.add(drafted)
        done = step(model, drafter, state)
        assert done.stops == tuple(reasons)
    assert len(seen) > 2, "rows should stop at different lengths"


def test_reasons_for_stopping_are_told_apart() -> None:
    model = target("llama")
    state = start(
        model,
        drafter := chain(model, max_draft=3),
        [Request(p, GREEDY, n) for p, n in zip(PROMPTS, (1, 3, 30), strict=True)],
    )
    rounds = list(decode(model, drafter, state))
    assert rounds[0].stops == (Stop.ROOM, Stop.ROOM, Stop.LENGTH)
    assert rounds[0].drafted == [0, 2, 3]
    assert {done.stops[0] for done in rounds[1:]} == {Stop.INACTIVE}
    assert all(done.drafted[0] == 0 and done.emitted[0] == [] for done in rounds[1:])


def test_nothing_is_drafted_that_could_not_be_emitted() -> None:
    """A round emits the drafts and one token more, so the last token of a row is never drafted."""
    model = target("llama")
    for name in {d for d in DRAFTERS if "tree" not in d} - {"none", "rest"}:
        run = generate(model, DRAFTERS[name](model), requests(PROMPTS, EVERYTHING, 9))
        for rounds, drafted in zip(run.rounds, run.drafted, strict=True):
            room = 9
            for emitted, count in zip(rounds, drafted, strict=True):
                assert count <= room - 1
                room -= len(emitted)


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING, Sampling(temperature=1.5, seed=5)])
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_a_drafter_that_thinks_what_the_target_thinks_is_always_right(kind: str, sampling: Sampling) -> None:
    """Draft and target share their noise and their processors, so at any temperature equal laws give equal tokens."""
    model = Target(build("llama", damping=0.0))  # its deep layers add nothing: early exit is the model itself
    drafter: Drafter = Kangaroo(model, None, EXIT, ChainConfig(max_draft=4, threshold=0))
    if kind == "tree":
        drafter = KangarooTree(model, None, EXIT, TreeConfig(top_k=3, max_draft=4, threshold=0))
    run = generate(model, drafter, requests(PROMPTS, sampling, 15))
    if kind == "chain":
        assert [[len(emitted) for emitted in rounds] for rounds in run.rounds] == [[5, 5, 5]] * 3
    else:  # of the deeper levels a tree keeps the paths that are likely as a whole
        assert all(len(emitted) >= 2 for rounds in run.rounds for emitted in rounds[:-1])


class Listener(NoDrafter):
    """Notes which rows' prompts it is shown, and from where."""

    def __init__(self) -> None:
        self.shown: list[tuple[list[int], list[int], list[int]]] = []

    def observe(self, state: State, committed: Committed) -> None:
        if committed.path is None:
            rows = range(state.batch) if committed.where.rows is None else committed.where.rows.tolist()
            self.shown.append((list(rows), committed.where.positions[:, 0].tolist(), committed.count.tolist()))


def test_a_drafter_is_shown_every_prompt_from_its_beginning_even_one_of_a_single_token() -> None:
    model, drafter = target("llama"), Listener()
    state = start(model, drafter, [Request([5], GREEDY, 3), Request([6], GREEDY, 9)], capacity=20)
    while state.active[0]:
        step(model, drafter, state)
    state.assign(0, Request([7], GREEDY, 3))
    prefill(model, drafter, state, rows=torch.tensor([0]))
    assert drafter.shown == [([0, 1], [0, 0], [0, 0]), ([0], [0], [0])]


# --- trees


@pytest.mark.parametrize("rule", ["match", "reject"])
@torch.inference_mode()
def test_a_tree_keeps_the_most_probable_paths_of_every_level(rule: str) -> None:
    """At temperature 1 without noise: the best K of all children by the product of probabilities from the root."""
    model, top_k = target("llama"), 3
    drafter = tree(model, top_k=top_k)
    state = start(model, drafter, requests(PROMPTS, GREEDY, 20), rule=rule)
    draft = drafter.draft(state)
    assert draft.depth == 3
    assert draft.tokens.shape == (3, 1 + 3 * top_k)
    for row in range(3):
        text = state.tokens[row, : state.lengths[row] + 1].tolist()
        best = [((), 1.0)]
        for level in range(3):
            grown = [
                ((*path, token), score * float(q))
                for path, score in best
                for token, q in enumerate(from_scratch(model, torch.tensor([*text, *path]))[1][-1].softmax(-1))
            ]
            best = sorted(grown, key=lambda item: -item[1])[:top_k]
            nodes = range(1 + level * top_k, 1 + (level + 1) * top_k)
            got = [tuple(draft.tokens[row, path_to(draft, row, node)[1:]].tolist()) for node in nodes]
            assert got == [path for path, _ in best]


@torch.inference_mode()
def test_branches_close_below_the_threshold_and_their_last_node_stays() -> None:
    model, threshold = target("llama"), 0.15
    drafter = tree(model, threshold)
    state = start(model, drafter, requests(PROMPTS, GREEDY, 30))
    closed = False
    for _ in range(6):
        draft = drafter.draft(state)
        for row in range(3):
            for node in draft.valid[row].nonzero()[1:, 0].tolist():
                path = path_to(draft, row, node)
                text = torch.cat([state.tokens[row, : state.lengths[row]], draft.tokens[row, path]])
                q = from_scratch(model, text)[1].softmax(-1)
                steps = [float(q[state.lengths[row] + i, draft.tokens[row, child]]) for i, child in enumerate(path[1:])]
                above = torch.tensor(steps[:-1]).prod()
                assert above >= threshold * 0.999, "a node grew from a closed branch"
                closed |= bool(above * steps[-1] < threshold)
        step(model, drafter, state)
    assert closed, "some valid nodes should be the unsure ends of their branches"


def test_siblings_are_different_tokens_of_one_parent() -> None:
    model = target("granite")
    drafter = tree(model, top_k=4)
    state = start(model, drafter, requests(PROMPTS, Sampling(temperature=1.0), 20))
    with torch.inference_mode():
        draft = drafter.draft(state)
    for row in range(3):
        pairs = list(zip(draft.parents[row].tolist(), draft.tokens[row].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert all(parent < node for node, (parent, _) in enumerate(pairs))


# --- plain decoding


def test_plain_decoding_is_one_token_per_round() -> None:
    run = generate(target("llama"), NoDrafter(), requests(PROMPTS, EVERYTHING, 5))
    assert [len(rounds) for rounds in run.rounds] == [5, 5, 5]
    assert run.drafted == [[0] * 5] * 3


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_keep_within_the_nodes_they_announce(name: str) -> None:
    model = target("llama")
    drafter = DRAFTERS[name](model)
    sizes: list[int] = []
    draft = drafter.draft

    def watched(state: State) -> Draft:
        made = draft(state)
        sizes.append(made.tokens.shape[1])
        assert name == "rest" or made.is_chain == ("tree" not in name or made.depth == 0)
        return made

    drafter.draft = watched  # type: ignore[method-assign]
    generate(model, drafter, requests(PROMPTS, EVERYTHING, 12))
    assert 1 <= max(sizes) <= drafter.nodes
    assert name == "none" or max(sizes) > 1


# --- confidence


def test_confidence_is_as_fine_in_half_precision_as_in_single() -> None:
    """Of 200 different confidences above a third, bfloat16 itself could hold only a few dozen."""
    rest = torch.randn(200, 1, 50, generator=torch.Generator().manual_seed(3))
    logits = torch.cat([torch.linspace(4, 9, 200)[:, None, None], rest], -1).bfloat16()
    sure = top_probability(logits)[:, 0]
    assert sure.dtype == torch.float32
    assert torch.allclose(sure, logits.double().softmax(-1).amax(-1)[:, 0].float(), rtol=1e-5)
    assert len(set(sure[sure > 0.3].tolist())) > 150
    assert top_probability(logits.double()).dtype == torch.float64
