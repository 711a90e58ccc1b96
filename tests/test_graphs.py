"""Passes at fixed addresses: the same bits as anywhere else, whatever came before in the same buffers.

Without CUDA nothing is captured. `Replaying` stands in for a captured graph: what it was given once it does again, with
whatever objects were in it then, so that nothing but the buffers may change from pass to pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from chat_model import save_chat_model
from kangaroo.cache import KVCache
from kangaroo.decode import start, step
from kangaroo.decoder import load
from kangaroo.errors import ConfigError
from kangaroo.graphs import MOST_ROWS, WIDEST, StaticPasses
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.tree import Placement, place, place_at, place_chain
from oracle import EVERYTHING, GREEDY, oracle
from runs import DRAFTERS, PROMPTS, generate, requests
from tiny import EXIT, LAYERS, VOCAB, build

pytestmark = pytest.mark.usefixtures("_own_cache")


@pytest.fixture
def _own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path / "cache"))


class Replaying:
    """What capturing does, on any device."""

    def __init__(self) -> None:
        self.aside_, self.captured, self.replayed, self.finished = 0, 0, 0, 0

    def aside(self, work: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        self.aside_ += 1
        return work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def finish(self) -> None:
        self.finished += 1


def static(by: Any = None, most: int = 64) -> StaticPasses:
    return StaticPasses(by, most)


@pytest.fixture(scope="module")
def model() -> Target:
    return Target(build("llama"))


@pytest.fixture(autouse=True)
def _plain_again(model: Target) -> Any:
    yield
    model.static = None


# --- bits


def passes(target: Target, lengths: list[int]) -> list[Tensor]:
    """Logits, tapped states, keys and values of passes of one to eight nodes, whole and by shallow and deep layers."""
    cache, found = target.new_cache(len(lengths), 90), list[Tensor]()
    at, random = torch.tensor(lengths, device=target.device), torch.Generator().manual_seed(1)
    text = torch.randint(VOCAB, (len(lengths), 90), generator=random).to(target.device)
    positions = torch.arange(max(lengths), device=target.device).expand(len(lengths), -1)
    target.run(target.embed(text[:, : max(lengths)]), place_at(positions, max(lengths), start=0, prompt=True), cache)
    for nodes in (1, 2, 3, 5, 8, 1):
        where = place_chain(at, nodes, max(lengths) + nodes, lengths[0] if len(set(lengths)) == 1 else None)
        x = target.embed(text.gather(1, where.positions))
        whole, taps = target.run(x, where, cache, taps=(0, EXIT, LAYERS))
        where = target.prepare(where)
        ahead = [target.run(x[:, i : i + 1], where[i : i + 1], cache, stop=EXIT)[0] for i in range(nodes)]
        deep, more = target.run(torch.cat(ahead, 1), where, cache, start=EXIT, taps=(EXIT,))
        found += [whole, deep, *taps.values(), *more.values(), target.logits(target.norm(deep))]
        found += [stored.clone() for pair in cache.visible(max(lengths) + nodes).values() for stored in pair]
        at, lengths = at + 1, [length + 1 for length in lengths]
    return found


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[59], [61, 58, 70], [30, 30]], ids=["alone", "ragged", "even"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "cohere2", "phi"])
def test_bits_are_those_of_other_passes(family: str, lengths: list[int]) -> None:
    target = Target(build(family))
    assert target.exactness.level == "bitwise"
    wanted = passes(target, lengths)
    for by in (None, Replaying()):
        target.static = static(by)
        got = passes(target, lengths)
        assert len(target.static) > 8
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


NAMES = [
    "none",
    "kangaroo",
    "kangaroo-auto",
    "kangaroo-deep",
    "early-exit",
    "kangaroo+lookup",
    "kangaroo-tree",
    "medusa",
]


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_rounds_are_the_same(name: str, sampling: Sampling, model: Target) -> None:
    drafter = DRAFTERS[name]
    torch.manual_seed(0)
    model.static = None
    wanted = generate(model, drafter(model), requests(PROMPTS, sampling, 60))
    by = Replaying()
    model.static = static(by)
    assert generate(model, drafter(model), requests(PROMPTS, sampling, 60)) == wanted
    assert name == "none" or sum(wanted.accepted) > 0
    assert by.captured > 0
    assert by.replayed > by.captured


def test_texts_are_the_oracles() -> None:
    target = Target(build("qwen3"))
    target.static = static(Replaying())
    run = generate(target, DRAFTERS["kangaroo"](target), requests(PROMPTS, EVERYTHING, 20))
    assert run.texts == [oracle(target.model, prompt, EVERYTHING, 20) for prompt in PROMPTS]


# --- rows come and go, caches grow, others decode


def test_rows_join_and_leave(tmp_path: Any) -> None:
    folder = save_chat_model(tmp_path)
    decoder = load(folder / "target", adapter=folder / "adapter", dtype=torch.float64, threshold=0.05)
    prompts = ["Where would", "I need 3 tickets", "The", "a" * 30, "What if there were no more of them", "So"]
    wanted = [decoder.generate([prompt], max_tokens=12 + 9 * i)[0] for i, prompt in enumerate(prompts)]
    by = Replaying()
    decoder.target.static = static(by)
    with decoder.engine(rows=3) as engine:
        tickets = [engine.submit(prompt, max_tokens=12 + 9 * i) for i, prompt in enumerate(prompts)]
        for ticket in tickets:
            list(ticket)
    got = [ticket.completion for ticket in tickets]
    assert [answer.tokens for answer in got] == [answer.tokens for answer in wanted]
    assert any(answer.stats.accepted for answer in got)
    assert by.replayed > 0


@torch.inference_mode()
def test_two_decode_in_turn_on_one_target(model: Target) -> None:
    model.static = static(Replaying())
    samplings, runs = (GREEDY, Sampling(temperature=0.9, seed=4)), list[list[list[int]]]()
    drafters = [DRAFTERS[name](model) for name in ("kangaroo", "early-exit")]
    states = [start(model, d, requests(PROMPTS, s, 25)) for d, s in zip(drafters, samplings, strict=True)]
    texts = [[[] for _ in PROMPTS] for _ in states]
    while any(state.running for state in states):
        for state, drafter, text in zip(states, drafters, texts, strict=True):
            for row, emitted in enumerate(step(model, drafter, state).emitted if state.running else []):
                text[row].extend(emitted)
    runs = texts
    model.static = None
    for sampling, found in zip(samplings, runs, strict=True):
        assert found == generate(model, DRAFTERS["none"](model), requests(PROMPTS, sampling, 25)).texts


@torch.inference_mode()
def test_a_cache_that_has_grown_is_another(model: Target) -> None:
    """Passes read storage where it lies: after it has moved, old ones would read what is gone."""
    model.static = static(Replaying())
    cache, where = model.new_cache(1, 20), place_chain(torch.tensor([3]), 1, 4, 3)
    x = model.embed(torch.tensor([[5]]))
    model.run(x, where, cache)
    model.run(x, where, cache)
    kept = len(model.static)
    before, _ = model.run(x, where, cache)
    cache.arrange([0], 200, 4)
    after, _ = model.run(x, where, cache)
    assert len(model.static) == kept + 1
    assert torch.equal(before, after)
    cache.arrange([0, -1], 200, 4)  # a second row, for which storage has to grow
    both, _ = model.run(x.expand(2, -1, -1), place_chain(torch.tensor([3, 0]), 1, 4), cache)
    assert torch.equal(both[:1], before)


# --- buffers


@torch.inference_mode()
def test_buffers_stay_and_results_are_copies(model: Target) -> None:
    model.static = static()
    seen, given = list[tuple[int, ...]](), list[Tensor]()

    def double(x: Tensor, where: Placement, cache: KVCache) -> list[Tensor]:
        blocked, cos, sin = next(iter(where.derived.values()))
        seen.append(tuple(tensor.data_ptr() for tensor in (x, where.positions, blocked, cos, sin)))
        given.append(blocked.clone())
        return [x * 2]

    cache = model.new_cache(1, 200)
    results = []
    for length in (3, 9, 70, 71, 9, 195, 140):
        x = torch.full((1, 3, model.width), float(length), dtype=model.dtype)
        where = place_chain(torch.tensor([length]), 3, length + 3, length)
        results.append(model.in_place("double", double, x, where, cache)[0])
        wanted = (
            torch.arange(given[-1].shape[-1]) <= torch.tensor([length, length + 1, length + 2, length + 2])[:, None]
        )
        assert torch.equal(given[-1][0, 0] == 0, wanted), "the fourth node stands in for the third"
    assert [result[0, 0, 0].item() for result in results] == [6, 18, 140, 142, 18, 390, 280]
    assert all(result.shape == (1, 3, model.width) for result in results)
    assert seen[0] == seen[1] == seen[4]
    assert seen[2] == seen[3] != seen[0]
    assert [mask.shape[-1] for mask in given] == [64, 64, 128, 128, 64, 256, 256]


def test_few_are_kept(model: Target) -> None:
    plain = generate(model, DRAFTERS["kangaroo"](model), requests(PROMPTS, GREEDY, 60))
    by = Replaying()
    model.static = static(by, most=3)
    assert generate(model, DRAFTERS["kangaroo"](model), requests(PROMPTS, GREEDY, 60)) == plain
    assert len(model.static) == 3
    assert by.finished > 0, "before one is let go, nothing of it may be under way"
    assert by.aside_ >= by.captured


@torch.inference_mode()
def test_what_comes_in_many_shapes_is_run_as_ever(model: Target) -> None:
    passes_, cache, at = static(), model.new_cache(1, 100), torch.tensor([5])
    one = torch.zeros(1, 1, model.width)
    chain, rows = place_chain(at, 1, 6, 5), torch.tensor([0])
    assert passes_.takes(one, chain, cache)
    assert passes_.takes(one, None, None)
    assert not passes_.takes(one, chain, None)
    assert not passes_.takes(one, place(at, torch.tensor([[-1]]), 6), cache)
    assert not passes_.takes(one, place_at(chain.positions, 6, rows), cache)
    assert not passes_.takes(one, place_at(chain.positions, 6, start=5, prompt=True), cache)
    assert not passes_.takes(torch.zeros(1, WIDEST + 1, model.width), chain, cache)
    assert not passes_.takes(torch.zeros(MOST_ROWS + 1, 1, model.width), chain, cache)
    with torch.inference_mode(False):
        assert not passes_.takes(one, chain, cache), "with gradients nothing may be overwritten"


# --- settings


def test_graphs_need_cuda() -> None:
    plain = build("llama")
    assert Target(plain).graphs == "off (not asked for)"
    assert Target(plain, graphs="auto").graphs == "off (CUDA graphs need a CUDA device, and the model is on cpu)"
    assert Target(plain, graphs="auto").static is None
    with pytest.raises(ConfigError, match="graphs=True cannot be honoured: CUDA graphs need a CUDA device"):
        Target(plain, graphs=True)
    with pytest.raises(ConfigError, match="graphs must be True, False"):
        Target(plain, graphs="yes")  # type: ignore[arg-type]
