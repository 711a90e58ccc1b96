"""Index arithmetic against plain Python: placement, cache, and the life of a row round after round."""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kangaroo.accept import clip, follow
from kangaroo.cache import KVCache, LayerShape
from kangaroo.sampling import Sampler, Sampling
from kangaroo.state import Request, State
from kangaroo.tree import Draft, Stop, ancestors, chain, place, place_at, place_chain

CPU, FEW = torch.device("cpu"), 4  # with few tokens drafts and draws often agree


def path_to(node: int, parents: list[int]) -> list[int]:
    return [*path_to(parents[node], parents), node] if node >= 0 else []


@st.composite
def trees(draw: st.DrawFn, most: int = 9) -> list[int]:
    """Parents before children, in any shape: chains, stars and all between."""
    nodes = draw(st.integers(1, most))
    if draw(st.booleans()):
        return list(range(-1, nodes - 1))
    return [-1, *(draw(st.integers(0, i - 1)) for i in range(1, nodes))]


# --- placement


@given(parents=trees(), lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), slack=st.integers(0, 3))
def test_nodes_see_the_committed_text_and_their_own_ancestors(
    parents: list[int], lengths: list[int], slack: int
) -> None:
    nodes, extent = len(parents), max(lengths) + len(parents) + slack
    where = place(torch.tensor(lengths), torch.tensor([parents] * len(lengths)), extent)
    for row, length in enumerate(lengths):
        for node in range(nodes):
            path = path_to(node, parents)
            assert where.slots[row, node] == length + node
            assert where.positions[row, node] == length + len(path) - 1
            assert where.slot_positions[row, length + node] == where.positions[row, node]
            seen = where.mask[row, node].nonzero()[:, 0].tolist()
            assert seen == [*range(length), *(length + i for i in path)]
        assert where.slot_positions[row, :length].tolist() == list(range(length))


@given(nodes=st.integers(1, 8), lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4), data=st.data())
def test_a_chain_is_a_tree_that_does_not_branch(nodes: int, lengths: list[int], data: st.DataObject) -> None:
    extent, start = max(lengths) + nodes, torch.tensor(lengths)
    tree = place(start, chain(len(lengths), nodes), extent)
    line = place_chain(start, nodes, extent)
    stretch = slice(*sorted((data.draw(st.integers(0, nodes)), data.draw(st.integers(0, nodes)))))
    for name in ("positions", "slots", "mask"):
        assert torch.equal(getattr(tree, name), getattr(line, name))
        assert torch.equal(getattr(tree[stretch], name), getattr(line, name)[:, stretch])
    visible = line.mask.any(1)
    assert torch.equal(tree.slot_positions[visible], line.slot_positions[visible])


@given(parents=trees(12))
def test_ancestors_are_the_path_from_the_root(parents: list[int]) -> None:
    reach = ancestors(torch.tensor([parents]))[0]
    assert [row.nonzero()[:, 0].tolist() for row in reach] == [path_to(i, parents) for i in range(len(parents))]


def test_lines_of_every_depth_are_followed_to_the_root() -> None:
    for nodes in range(1, 66):
        reach = ancestors(chain(1, nodes))[0]
        assert torch.equal(reach, torch.ones(nodes, nodes).tril().bool())


# --- the cache


def tiny_cache(batch: int, slots: int, layers: int = 2) -> KVCache:
    return KVCache([LayerShape(1, 1, 2, torch.float64, CPU)] * layers, batch, slots)


def contents(cache: KVCache, layer: int, extent: int) -> list[list[int]]:
    """What each row's slots hold, keys and values having been written alike."""
    keys, values = cache.read(layer, extent, None)
    assert torch.equal(keys.expand_as(values), values)
    return keys[:, 0, :, 0].long().tolist()


def store(cache: KVCache, layer: int, slots: Tensor, tokens: Tensor, rows: Tensor | None = None) -> None:
    keys = tokens[:, None, :, None].double()
    cache.write(layer, slots, keys, keys.expand(-1, -1, -1, 2), rows)


@given(data=st.data())
def test_what_is_written_to_some_rows_leaves_the_others_alone(data: st.DataObject) -> None:
    cache = tiny_cache(4, 6)
    store(cache, 1, torch.arange(6).expand(4, 6), torch.full((4, 6), 9))
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    slots = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
    tokens = torch.arange(len(rows) * len(slots)).reshape(len(rows), len(slots))
    store(cache, 1, torch.tensor([slots] * len(rows)), tokens, torch.tensor(rows))
    want = [[9] * 6 for _ in range(4)]
    for i, row in enumerate(rows):
        for j, slot in enumerate(slots):
            want[row][slot] = int(tokens[i, j])
    assert contents(cache, 1, 6) == want
    assert contents(cache, 0, 6) == [[0] * 6] * 4
    picked, _ = cache.read(1, 4, torch.tensor(rows))
    assert picked[:, 0, :, 0].long().tolist() == [want[row][:4] for row in rows]


# --- rounds


@dataclass
class Row:
    """A row as plain Python sees it: `text` ends in the pending token."""

    text: list[int]
    room: int
    active: bool = True

    def round(self, draft: list[tuple[int, int, bool]], drawn: list[int], eos: set[int]) -> list[int]:
        """Follow the target's draws through a draft of (token, parent, valid); return what is emitted."""
        emitted: list[int] = []
        node: int | None = 0
        while self.active and node is not None:
            token = drawn[node]
            emitted.append(token)
            self.text.append(token)
            self.room -= 1
            self.active = token not in eos and self.room > 0
            matches = [i for i, (t, parent, valid) in enumerate(draft) if parent == node and valid and t == token]
            node = matches[0] if matches else None
        return emitted


@settings(max_examples=150)
@given(data=st.data())
def test_rounds_of_random_drafts_do_what_plain_python_does(data: st.DataObject) -> None:
    """Texts, room, ends and the cache of every layer stay as they should, whatever is drafted and drawn."""
    eos = data.draw(st.sets(st.integers(0, FEW - 1), max_size=1))
    prompts = data.draw(st.lists(st.lists(st.integers(0, FEW - 1), min_size=1, max_size=4), min_size=1, max_size=3))
    rows = [Row(list(prompt), data.draw(st.integers(1, 12))) for prompt in prompts]
    state = new_state(rows, eos)
    for _ in range(8):
        if not any(row.active for row in rows):
            break
        parents = data.draw(trees())
        draft = random_draft(data, rows, parents)
        drawn = data.draw(grids(len(rows), len(parents)))
        where = place(state.lengths, draft.parents, state.longest + len(parents))
        for layer in range(2):
            store(state.cache, layer, where.slots, draft.tokens)
        verdict = clip(follow(draft, torch.tensor(drawn)), draft, state)
        before = state.lengths
        committed = state.commit(draft, verdict, {7: draft.tokens[..., None].double()})
        for i, row in enumerate(rows):
            nodes = list(zip(draft.tokens[i].tolist(), parents, draft.valid[i].tolist(), strict=True))
            emitted = row.round(nodes, drawn[i], eos)
            assert verdict.length[i] == committed.count[i] == len(emitted)
            assert state.tokens[i, : len(row.text)].tolist() == row.text
            assert (int(state.lengths[i]), int(state.room[i]), bool(state.active[i])) == (
                len(row.text) - 1,
                row.room,
                row.active,
            )
            joined = row.text[int(before[i]) : int(state.lengths[i])]
            assert committed.tokens[i, : len(emitted)].tolist() == joined
            assert committed.features[7][i, : len(emitted), 0].tolist() == joined
            assert committed.where.positions[i, : len(emitted)].tolist() == list(range(before[i], state.lengths[i]))
            for layer in range(2):
                assert contents(state.cache, layer, state.cache.slots)[i][: len(row.text) - 1] == row.text[:-1]


def new_state(rows: list[Row], eos: set[int]) -> State:
    """Rows whose prompts have been run, each but for its last token."""
    slots = max(len(row.text) + row.room for row in rows) + 9
    requests = [Request(row.text, Sampling(), row.room) for row in rows]
    state = State(requests, tiny_cache(len(rows), slots), Sampler([Sampling()] * len(rows), FEW, CPU), sorted(eos))
    longest = max(len(row.text) for row in rows)
    where = place_at(torch.arange(longest).expand(len(rows), -1), longest)
    for layer in range(2):
        store(state.cache, layer, where.slots, state.tokens[:, :longest])
    state.commit_prompt(0, longest, where, {})
    return state


def grids(rows: int, columns: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, FEW - 1), min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows)


def random_draft(data: st.DataObject, rows: list[Row], parents: list[int]) -> Draft:
    nodes = len(parents)
    tokens = torch.tensor(data.draw(grids(len(rows), nodes)))
    tokens[:, 0] = torch.tensor([row.text[-1] for row in rows])
    valid = torch.tensor([data.draw(st.lists(st.sampled_from([True, True, False]), min_size=nodes, max_size=nodes))])
    valid = valid.repeat(len(rows), 1)
    valid[:, 0] = True
    return Draft(
        tokens=tokens,
        parents=torch.tensor([parents] * len(rows)),
        valid=valid,
        depth=max(len(path_to(i, parents)) for i in range(nodes)) - 1,
        stops=(Stop.LENGTH,) * len(rows),
    )


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    chunk=st.integers(1, 5),
)
def test_prompts_are_committed_chunk_by_chunk_up_to_their_last_tokens(lengths: list[int], chunk: int) -> None:
    rows = [Row([i % FEW for i in range(length)], 3) for length in lengths]
    requests = [Request(row.text, Sampling(), row.room) for row in rows]
    state = State(requests, tiny_cache(len(rows), 16), Sampler([Sampling()] * len(rows), FEW, CPU), ())
    seen = [0] * len(rows)
    for begin in range(0, max(lengths), chunk):
        where = place_at(torch.arange(begin, begin + chunk).expand(len(rows), -1), begin + chunk)
        committed = state.commit_prompt(begin, chunk, where, {})
        seen = [total + int(new) for total, new in zip(seen, committed.count, strict=True)]
        assert state.lengths.tolist() == seen == [min(n - 1, begin + chunk) for n in lengths]
    assert state.pending[:, 0].tolist() == [row.text[-1] for row in rows]
