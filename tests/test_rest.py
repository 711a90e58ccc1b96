"""REST: what is kept of many continuations, and the trees that rows of a batch draft together."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kangaroo.decode import decode, start
from kangaroo.drafters.copying.datastore import Datastore
from kangaroo.drafters.copying.rest import Rest, RestConfig, Trie, build, merge
from kangaroo.errors import ConfigError
from kangaroo.state import State
from kangaroo.tree import Draft, Stop
from oracle import EVERYTHING, GREEDY, oracle
from runs import PROMPTS, generate, index, make_datastore, requests
from tiny import VOCAB, target

END = 9


def paths(tokens: Sequence[int], parents: Sequence[int]) -> list[tuple[int, ...]]:
    """The way to every node but the root, which `tokens` and `parents` leave out."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*found[parent], token))
    return found[1:]


def trie_paths(trie: Trie) -> list[tuple[int, ...]]:
    return paths(trie.tokens.tolist(), trie.parents.tolist())


# --- merging continuations


@given(st.lists(st.lists(st.integers(0, 3) | st.just(END), min_size=4, max_size=4), min_size=1), st.integers(1, 12))
def test_the_most_frequent_beginnings_are_kept(rows: list[list[int]], most: int) -> None:
    rows.sort()
    read = [row[: row.index(END)] if END in row else row for row in rows]
    counts = Counter(tuple(row[:n]) for row in read for n in range(1, len(row) + 1))
    best = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:most]
    trie = merge(np.array(rows), END, most)
    assert trie_paths(trie) == sorted(best, key=lambda path: (len(path), path))
    assert trie.depth == max(map(len, best), default=0)
    assert all(parent <= node for node, parent in enumerate(trie.parents.tolist()))


def test_ties_go_to_the_shallower_node_and_then_to_the_smaller_ids() -> None:
    rows = np.array([[1, 5, 5], [2, 4, 4], [2, 4, 6], [3, 1, 1]])
    assert trie_paths(merge(rows, END, 1)) == [(2,)]
    assert trie_paths(merge(rows, END, 2)) == [(2,), (2, 4)]
    assert trie_paths(merge(rows, END, 3)) == [(1,), (2,), (2, 4)]
    assert trie_paths(merge(rows, END, 5)) == [(1,), (2,), (3,), (1, 5), (2, 4)]


def test_ids_that_the_model_has_not_end_a_continuation() -> None:
    assert trie_paths(merge(np.array([[1, 7, 2], [1, 8, 8]]), 7, 9)) == [(1,)]
    assert merge(np.array([[7, 1, 2], [8, 1, 2]]), 7, 9).depth == 0


# --- drafts


def rest(documents: Sequence[Sequence[int]], **settings: int) -> Rest:
    return Rest(Datastore(index(documents, VOCAB), VOCAB), RestConfig(**settings))


@torch.inference_mode()
def first_draft(drafter: Rest, prompts: Sequence[Sequence[int]], room: int = 20) -> tuple[Draft, State]:
    state = start(target("llama"), drafter, requests(prompts, GREEDY, room))
    return drafter.draft(state), state


def row_paths(draft: Draft, row: int) -> list[tuple[int, ...]]:
    nodes = draft.valid[row, 1:].nonzero()[:, 0] + 1
    assert nodes.tolist() == list(range(1, len(nodes) + 1)), "padding comes last"
    return paths(draft.tokens[row, nodes].tolist(), draft.parents[row, nodes].tolist())


BOOK = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 30], [20, 21, 22], [20, 21, 23], [1, 6, 7, 40], [1, 6, 7, 40]]


def test_the_pending_token_is_part_of_what_is_looked_up_and_the_longest_run_wins() -> None:
    draft, state = first_draft(rest(BOOK), [[5, 6, 7], [9, 6, 7], [1, 6, 7], [7, 5]])
    assert draft.tokens[:, 0].tolist() == state.pending[:, 0].tolist() == [7, 7, 7, 5]
    assert row_paths(draft, 0) == [(8,), (30,), (8, 9), (8, 9, 10)]
    assert row_paths(draft, 1) == [(8,), (30,), (40,), (8, 9), (8, 9, 10)]
    assert row_paths(draft, 2) == [(40,)]
    assert row_paths(draft, 3) == []
    assert draft.stops == (Stop.LENGTH, Stop.LENGTH, Stop.LENGTH, Stop.NOTHING)
    assert draft.probs is None
    assert draft.layers_done == 0


def test_runs_are_of_the_lengths_asked_for() -> None:
    prompts = [[1, 6, 7], [9, 6, 7], [9, 9, 7]]
    draft, _ = first_draft(rest(BOOK, longest=2), prompts)
    assert row_paths(draft, 0) == row_paths(draft, 1) == [(8,), (30,), (40,), (8, 9), (8, 9, 10)]
    assert row_paths(draft, 2) == []
    draft, _ = first_draft(rest(BOOK, shortest=3), prompts)
    assert [len(row_paths(draft, row)) for row in range(3)] == [1, 0, 0]
    draft, _ = first_draft(rest(BOOK, shortest=1), prompts)
    assert (40,) in row_paths(draft, 2)


def test_room_and_continuation_bound_the_depth_and_nodes_the_size() -> None:
    for room in range(1, 6):
        draft, _ = first_draft(rest(BOOK), [[5, 6, 7], [9, 9]], room)
        assert draft.depth == min(3, room - 1)
        assert draft.stops == (Stop.ROOM if room <= 4 else Stop.LENGTH, Stop.ROOM if room == 1 else Stop.NOTHING)
    draft, _ = first_draft(rest(BOOK, continuation=2), [[5, 6, 7]])
    assert row_paths(draft, 0) == [(8,), (30,), (8, 9)]
    draft, _ = first_draft(rest(BOOK, nodes=3), [[9, 6, 7]])
    assert row_paths(draft, 0) == [(8,), (40,)]


def test_where_nothing_is_found_the_draft_is_the_pending_token() -> None:
    draft, _ = first_draft(rest(BOOK), [[60], [61, 62]])
    assert draft.tokens.shape == (2, 1)
    assert draft.is_chain
    assert draft.stops == (Stop.NOTHING, Stop.NOTHING)


def test_chains_are_drafted_as_chains() -> None:
    draft, _ = first_draft(rest(BOOK), [[6, 7, 8], [1, 6, 7], [60]])
    assert draft.is_chain
    assert draft.parents.tolist() == [[-1, 0, 1]] * 3
    assert draft.valid.tolist() == [[True, True, True], [True, True, False], [True, False, False]]


def test_a_tree_beside_a_chain_as_deep_as_it_is_wide_remains_a_tree() -> None:
    drafter = rest(BOOK, nodes=3, continuation=2)
    draft, _ = first_draft(drafter, [[6, 7, 8], [20, 21]])
    assert not draft.is_chain
    assert row_paths(draft, 0) == [(9,), (9, 10)]
    assert row_paths(draft, 1) == [(22,), (23,)]
    assert draft.tokens.shape[1] == drafter.nodes == 4
    assert [rest(BOOK, nodes=3, continuation=n).nodes for n in (1, 2, 500)] == [3, 4, 4]


def test_a_tree_beside_a_chain_is_verified_as_a_tree() -> None:
    """The second row's second branch is right; as a chain it would be refused, and its keys be kept in a wrong slot."""
    model = target("llama")
    prompts = [list(PROMPTS[0]), [20, 21]]
    texts = [oracle(model.model, prompt, GREEDY, 8) for prompt in prompts]
    right = texts[1][0]
    assert right > 0
    books = [[*PROMPTS[0], *texts[0]], [20, 21, 0], [20, 21, *texts[1]]]
    run = generate(model, rest(books, nodes=3, continuation=2), requests(prompts, GREEDY, 8))
    assert run.texts == texts
    assert run.rounds[1][0][0] == right
    assert len(run.rounds[1][0]) == 2


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rule", ["match", "reject"])
def test_drafts_keep_to_the_room_and_the_nodes(rule: str, sampling: object) -> None:
    model, drafter = target("mistral"), Rest(make_datastore(target("mistral")), RestConfig(nodes=7, continuation=6))
    state = start(model, drafter, requests(PROMPTS, sampling, 9), rule=rule)  # type: ignore[arg-type]
    shapes, make = set(), drafter.draft

    def watched(state: State) -> Draft:
        draft = make(state)
        for row in range(state.batch):
            deepest = max(map(len, row_paths(draft, row)), default=0)
            assert deepest <= max(0, int(state.room[row]) - 1)
            assert len(row_paths(draft, row)) <= 6
        assert draft.tokens.shape[1] <= drafter.nodes
        shapes.add(draft.is_chain)
        return draft

    drafter.draft = watched  # type: ignore[method-assign]
    for _ in decode(model, drafter, state):
        pass
    assert False in shapes, "some drafts should branch"


@torch.inference_mode()
def test_finished_rows_draft_nothing() -> None:
    drafter = rest(BOOK)
    _, state = first_draft(drafter, [[5, 6, 7], [5, 6, 7]])
    state.finish(0)
    draft = drafter.draft(state)
    assert [len(row_paths(draft, row)) for row in range(2)] == [0, 4]
    assert draft.stops == (Stop.INACTIVE, Stop.LENGTH)


def test_a_long_context_costs_what_a_short_one_does() -> None:
    """However long a row is, only its last `longest` tokens leave the state."""
    drafter, asked = rest(BOOK), list[int]()
    suffixes = drafter._datastore.suffixes
    find = suffixes.find
    suffixes.find = lambda context, *lengths: asked.append(len(context)) or find(context, *lengths)  # type: ignore
    draft, _ = first_draft(drafter, [[60] * 90 + [5, 6, 7], [5, 6, 7], [60] * 13 + [5, 6, 7], [60] * 14 + [5, 6, 7]])
    assert asked == [16, 3, 16, 16]
    assert all(row_paths(draft, row) == row_paths(draft, 1) for row in range(4))


# --- settings


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RestConfig(nodes=1), "nodes"),
        (lambda: RestConfig(nodes=65), "nodes"),
        (lambda: RestConfig(shortest=0), "shortest"),
        (lambda: RestConfig(shortest=5, longest=4), "longest"),
        (lambda: RestConfig(continuation=0), "continuation"),
        (lambda: RestConfig(occurrences=0), "occurrences"),
        (lambda: build(target("llama"), object(), {}), "datastore"),
        (lambda: build(target("llama"), None, {"datastore": "books.rest"}), "tokenizer"),
        (lambda: build(target("llama"), object(), {"datastore": "books.rest", "node": 3}), "nodes"),
    ],
)
def test_settings_that_cannot_be(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
