"""From logits to tokens: processors, keyed noise, and the distribution of what comes out."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kangaroo.accept
import kangaroo.drafters.chain as chain_drafter
from distributions import BROKEN, CHANCE, SMALL, misfit, sample, small_target
from kangaroo.accept import clip, reject
from kangaroo.cache import KVCache
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.copying.datastore import Datastore
from kangaroo.drafters.copying.rest import Rest, RestConfig
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.kangaroo.tree import KangarooTree, TreeConfig
from kangaroo.drafters.none import NoDrafter
from kangaroo.errors import ConfigError
from kangaroo.sampling import Prefix, Sampler, Sampling, Stream, best, gumbel
from kangaroo.state import Request, State
from kangaroo.tree import Draft, Stop, chain, place_chain
from oracle import EVERYTHING, reference_scores
from runs import index
from tiny import make_adapter

CPU, VOCAB = torch.device("cpu"), 61
PROCESSORS = {
    "temperature": Sampling(temperature=0.7),
    "top-k": Sampling(temperature=1.0, top_k=7),
    "top-k beyond the vocabulary": Sampling(temperature=1.0, top_k=1000),
    "top-p": Sampling(temperature=1.0, top_p=0.8),
    "tiny top-p": Sampling(temperature=1.0, top_p=1e-9),
    "min-p": Sampling(temperature=1.0, min_p=0.1),
    "repetition": Sampling(temperature=1.0, repetition_penalty=1.7),
    "repetition below one": Sampling(temperature=1.0, repetition_penalty=0.6),
    "presence": Sampling(temperature=1.0, presence_penalty=0.9),
    "frequency": Sampling(temperature=1.0, frequency_penalty=-0.4),
    "bias": Sampling(temperature=1.0, logit_bias={0: 3.0, VOCAB - 1: -math.inf}),
    "greedy with penalties": Sampling(repetition_penalty=1.3, presence_penalty=0.2, logit_bias={4: 1.0}),
    "everything": EVERYTHING,
}


class Dispatched(TorchDispatchMode):
    """Notes the operators that run and the shapes of the tensors they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.names.add(str(operator.overloadpacket))
        self.shapes += [made.shape for made in (result if isinstance(result, tuple | list) else (result,))]
        return result


def sampler(*samplings: Sampling, vocab: int = VOCAB) -> Sampler:
    return Sampler(samplings, vocab, CPU)


def prefix_of(texts: Sequence[Sequence[int]], prompts: Sequence[int], nodes: Tensor, parents: Tensor) -> Prefix:
    """Committed texts of ragged length, with leftovers of rejected drafts behind them."""
    tokens = torch.full((len(texts), max(map(len, texts)) + 3), 1)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    return Prefix(tokens, torch.tensor([len(t) for t in texts]), torch.tensor(prompts), nodes, parents)


def path_to(node: int, parents: Sequence[int]) -> list[int]:
    return [*path_to(parents[node], parents), node] if node >= 0 else []


# --- processors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, VOCAB, 8192])
def test_the_best_token_is_the_first_of_equals(dtype: torch.dtype, size: int) -> None:
    tied = torch.randint(-2, 3, (3, 5, size), generator=torch.Generator().manual_seed(0)).to(dtype)
    tied[0, 0] = -math.inf
    tied[0, 1, size // 2 :] = math.inf
    for node in itertools.product(range(3), range(5)):
        scores = tied[node].tolist()
        assert int(best(tied)[node]) == scores.index(max(scores))


@pytest.mark.parametrize("sampling", PROCESSORS.values(), ids=PROCESSORS)
def test_processors_are_those_of_transformers_at_every_node_of_a_tree(sampling: Sampling) -> None:
    """Each node's penalties count its own ancestors: siblings see nothing of one another."""
    parents = [-1, 0, 0, 1, 1, 2, 5, 6]
    nodes = torch.randint(8, (2, len(parents)))  # few tokens, many repetitions
    texts, prompts = [[3, 1, 4, 1, 5, 9], [2, 7]], [4, 3]  # the second row's pending token ends its prompt
    logits = torch.randn(2, len(parents), VOCAB, dtype=torch.float64) * 3
    both = sampler(sampling, sampling)
    got = both.scores(logits, prefix_of(texts, prompts, nodes, torch.tensor([parents, parents])))
    for row, node in itertools.product(range(2), range(len(parents))):
        text = [*texts[row], *nodes[row, path_to(node, parents)].tolist()]
        want = reference_scores(logits[row, node], text[: prompts[row]], text[prompts[row] :], sampling)
        assert torch.equal(got[row, node].isinf(), want.isinf())
        assert torch.allclose(got[row, node], want, rtol=1e-12)


@given(
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    output=st.lists(st.integers(0, 4), max_size=6),
)
def test_presence_counts_once_and_frequency_every_time_in_the_output_alone(
    presence: float, frequency: float, prompt: list[int], output: list[int]
) -> None:
    text = [*prompt, *output]
    one = sampler(Sampling(presence_penalty=presence, frequency_penalty=frequency), vocab=5)
    pending = torch.tensor([[text[-1]]])
    prefix = prefix_of([text[:-1]], [len(prompt)], pending, torch.tensor([[-1]]))
    got = one.scores(torch.zeros(1, 1, 5, dtype=torch.float64), prefix)[0, 0].tolist()
    counts = Counter(output)
    assert got == pytest.approx([-(presence * (counts[v] > 0) + frequency * counts[v]) for v in range(5)], abs=1e-12)


def test_a_rows_processors_are_its_own() -> None:
    samplings = list(PROCESSORS.values())
    logits = torch.randn(len(samplings), 1, VOCAB, dtype=torch.float64)
    texts = [[1, 2, 3, 2]] * len(samplings)
    pending, root = torch.full((len(texts), 1), 5), torch.full((len(texts), 1), -1)
    got = sampler(*samplings).scores(logits, prefix_of(texts, [2] * len(texts), pending, root))
    for row, sampling in enumerate(samplings):
        alone = prefix_of(texts[:1], [2], pending[:1], root[:1])
        assert torch.equal(got[row], sampler(sampling).scores(logits[row : row + 1], alone)[0])


def test_tokens_that_tie_share_their_fate_under_filters() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])[None, None].double()
    nothing = prefix_of([[0]], [1], torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[-1]]))
    for sampling in (Sampling(temperature=1, top_k=2), Sampling(temperature=1, top_p=0.6)):
        assert sampler(sampling, vocab=5).scores(logits, nothing)[0, 0].isfinite().tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_greedy_draw_takes_the_first_of_the_best_in_any_precision(kind: torch.dtype) -> None:
    """As if the logits had been widened first, however many tie; no wider copy of them is made."""
    logits = (torch.randn(40, 3, 4096, generator=torch.Generator().manual_seed(5)) / 2).to(kind).round(decimals=1)
    best = logits.amax(-1, keepdim=True)
    assert int(((logits == best).sum(-1) > 1).sum()) > 10, "some must tie"
    nothing = prefix_of([[0]] * 40, [1] * 40, torch.zeros(40, 3, dtype=torch.int64), chain(40, 3))
    with Dispatched() as made:
        got = sampler(*[Sampling()] * 40, vocab=4096).draw(logits, nothing, torch.zeros(40, 3, dtype=torch.int64))
    assert torch.equal(got, (logits == best).int().argmax(-1))
    assert torch.equal(got, logits.double().argmax(-1))
    assert not [shape for shape in made.shapes if shape == logits.shape]


@pytest.mark.parametrize(
    ("filters", "sorts"), [({"min_p": 0.1}, False), ({"top_k": 5}, False), ({"top_k": 5, "top_p": 0.9}, True)]
)
def test_only_top_p_sorts_the_vocabulary(filters: dict[str, Any], sorts: bool) -> None:
    nothing = prefix_of([[0]], [1], torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[-1]]))
    with Dispatched() as made:
        sampler(Sampling(temperature=1.0, **filters)).scores(torch.randn(1, 1, VOCAB), nothing)
    assert ("aten.sort" in made.names) == sorts


def test_penalties_make_no_table_of_the_vocabulary_for_every_node() -> None:
    vocab, nodes = 4096, 6
    text = prefix_of([[1, 2, 3, 2]], [2], torch.full((1, nodes), 7), chain(1, nodes))
    logits = torch.randn(1, nodes, vocab)
    with Dispatched() as made:
        sampler(Sampling(repetition_penalty=1.2, presence_penalty=0.1), vocab=vocab).scores(logits, text)
    assert made.shapes.count(logits.shape) == 1, "the scores themselves"


def test_a_filter_of_another_row_leaves_a_row_without_it_alone() -> None:
    """Tokens so unlikely that the sum of those before them rounds to one are still not cut by a top-p of one."""
    logits = torch.tensor([0.0, -60, -70, -80])[None, None]
    alone, beside = Sampling(temperature=1, top_k=3), Sampling(temperature=1, top_p=0.5)
    nothing = prefix_of([[0]] * 2, [1] * 2, torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), -1))
    got = sampler(alone, beside, vocab=4).scores(logits.repeat(2, 1, 1), nothing)
    assert got.isfinite().tolist() == [[[True, True, True, False]], [[True, False, False, False]]]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-300}, "temperature"),  # single precision would divide by zero
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"index": -1}, "index"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
        ({"logit_bias": {3: math.nan}}, "logit_bias"),
        ({"logit_bias": {3: math.inf}}, "logit_bias"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value)


def test_a_bias_on_a_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="logit_bias names token 61"):
        sampler(Sampling(logit_bias={VOCAB: 1.0}))
    with pytest.raises(ConfigError, match="logit_bias names token 61"):
        sampler(Sampling()).replace(0, Sampling(logit_bias={VOCAB: 1.0}))


def test_the_lowest_temperature_draws_the_best_token() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -4.0])[None, None]
    nothing = prefix_of([[0]], [1], torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[-1]]))
    for filters in ({}, {"top_p": 0.9, "min_p": 0.1, "top_k": 3}):
        one = sampler(Sampling(temperature=1e-6, **filters), vocab=4)
        assert one.draw(logits, nothing, torch.tensor([[5]])).item() == 1
        assert one.probs(logits, nothing)[0, 0].tolist() == [0, 1, 0, 0]


# --- keyed noise


def noise(one: Sampler, positions: Tensor, stream: Stream = Stream.TARGET) -> Tensor:
    return gumbel(one.keys(positions, stream), VOCAB)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    index=st.integers(0, 2**31 - 1),
    position=st.integers(0, 2**40),
    row=st.integers(0, 3),
    node=st.integers(0, 4),
)
def test_noise_is_a_function_of_seed_index_and_position_alone(
    seed: int, index: int, position: int, row: int, node: int
) -> None:
    mine = Sampling(temperature=1, seed=seed, index=index)
    alone = noise(sampler(mine), torch.tensor([[position]]))[0, 0]
    others = [Sampling(temperature=0.5, seed=99)] * 4
    others[row] = mine
    positions = torch.arange(20).reshape(4, 5)
    positions[row, node] = position
    assert torch.equal(noise(sampler(*others), positions)[row, node], alone)


def test_noise_differs_wherever_any_key_differs() -> None:
    seeds, indices, positions = (0, 1, -1, 2**62), (0, 1, 2), (0, 1, 2, 3, 4, 8, 1024)
    keys = [
        int(sampler(Sampling(temperature=1, seed=seed, index=index)).keys(torch.tensor([[position]]), stream))
        for seed, index, position, stream in itertools.product(seeds, indices, positions, Stream)
    ]
    assert len(set(keys)) == len(seeds) * len(indices) * len(positions) * len(Stream)


def test_noise_is_standard_gumbel_and_uncorrelated_across_positions_indices_and_tokens() -> None:
    rows = sampler(*(Sampling(temperature=1, index=i) for i in range(40)))
    values = noise(rows, torch.arange(50).expand(40, 50))
    n = values.numel()
    assert values.mean().item() == pytest.approx(0.5772156649, abs=4 * 1.2825 / math.sqrt(n))
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    uniform = torch.exp(-torch.exp(-values))
    assert ks_distance(uniform.flatten()) < 2.2 / math.sqrt(n)  # exceeded once in 8,000 seeds
    centred = (uniform - 0.5) * math.sqrt(12)
    for dim in range(3):
        size = values.shape[dim] - 1
        products = centred.narrow(dim, 0, size) * centred.narrow(dim, 1, size)
        assert abs(products.mean().item()) < 4.5 / math.sqrt(products.numel())
    for stream in (Stream.DRAFT, Stream.ACCEPT, Stream.RESIDUAL):
        other = torch.exp(-torch.exp(-noise(rows, torch.arange(50).expand(40, 50), stream)))
        assert abs(((other - 0.5) * math.sqrt(12) * centred).mean().item()) < 4.5 / math.sqrt(n)


def ks_distance(sample: Tensor) -> float:
    ordered = sample.sort().values
    return float((ordered - (torch.arange(len(ordered)) + 0.5) / len(ordered)).abs().max())


def test_greedy_rows_draw_without_noise_beside_rows_that_sample() -> None:
    both = sampler(Sampling(), Sampling(temperature=1.0))
    logits = torch.randn(2, 30, VOCAB)
    nodes, parents = torch.zeros(2, 30, dtype=torch.int64), chain(2, 30)
    drawn = both.draw(logits, prefix_of([[1], [1]], [1, 1], nodes, parents), torch.arange(30).expand(2, 30))
    assert torch.equal(drawn[0], logits[0].argmax(-1))
    assert not torch.equal(drawn[1], logits[1].argmax(-1))


# --- distributions: joint frequencies of three tokens against their exact probabilities


def sampled_chain() -> Drafter:
    target = small_target()
    return Kangaroo(target, make_adapter(target, 1, scale=2.0), 1, ChainConfig(max_draft=2, threshold=0))


def chain_of_few() -> Drafter:
    """Most of what the target says is never drafted."""
    target = small_target()
    adapter = make_adapter(target, 1, scale=2.0, draft_vocabulary=2)
    return Kangaroo(target, adapter, 1, ChainConfig(max_draft=2, threshold=0))


def confident_chain() -> Drafter:
    return Kangaroo(small_target(), None, 1, ChainConfig(max_draft=2, threshold=0.45))


def tree() -> Drafter:
    target = small_target()
    return KangarooTree(target, make_adapter(target, 1), 1, TreeConfig(top_k=3, max_draft=2, threshold=0))


def copied_tree() -> Drafter:
    """Certain of what it found: no probabilities, and most of it wrong."""
    texts = torch.randint(SMALL, (20, 30), generator=torch.Generator().manual_seed(0)).tolist()
    return Rest(Datastore(index(texts, SMALL), SMALL), RestConfig(nodes=6, continuation=2, shortest=1, longest=2))


def greedy_choice(logits: Tensor, tokens: Tensor, state: State, _: object) -> tuple[Tensor, Tensor]:
    """The best token, honestly said to be certain."""
    nodes = tokens.shape[1]
    probs = state.sampler.probs(logits, state.prefix(tokens, chain(state.batch, nodes)))
    return logits.argmax(-1), torch.nn.functional.one_hot(logits.argmax(-1), SMALL).to(probs.dtype)


def test_keyed_noise_draws_from_the_models_distribution() -> None:
    assert sample(NoDrafter(), "match") < CHANCE


def test_noise_that_ignores_the_position_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Sampler.keys
    monkeypatch.setattr(Sampler, "keys", lambda self, counters, stream: keys(self, torch.zeros_like(counters), stream))
    assert sample(NoDrafter(), "match") > BROKEN


@pytest.mark.parametrize("make", [sampled_chain, chain_of_few, confident_chain, tree, copied_tree])
def test_rejection_sampling_draws_from_the_models_distribution(make: Callable[[], Drafter]) -> None:
    assert sample(make(), "reject") < CHANCE


def test_rejection_sampling_of_greedy_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_drafter, "choose", greedy_choice)
    assert sample(sampled_chain(), "reject") < CHANCE


@pytest.mark.parametrize("make", [sampled_chain, tree])
def test_a_residual_that_is_not_subtracted_is_found_out(
    make: Callable[[], Drafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kangaroo.accept, "_residual", lambda p, q: p)
    assert sample(make(), "reject") > BROKEN


def test_noise_shared_by_draft_and_residual_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared:
        ACCEPT, RESIDUAL = Stream.ACCEPT, Stream.DRAFT

    monkeypatch.setattr(kangaroo.accept, "Stream", Shared)
    assert sample(sampled_chain(), "reject") > BROKEN


# --- siblings drawn at random, one after the other without replacement

TARGET_LAW = torch.tensor([0.30, 0.05, 0.40, 0.05, 0.20], dtype=torch.float64)
DRAFT_LAW = torch.tensor([0.05, 0.55, 0.25, 0.10, 0.05], dtype=torch.float64)


def reject_siblings(conditional: bool) -> list[list[int]]:
    """First tokens after a root with three random children; `conditional`: is each q told about its elder siblings?"""
    rows = 20000
    samplings = [Sampling(temperature=1, index=i) for i in range(rows)]
    state = State(
        [Request([0], s, 1) for s in samplings], KVCache([], rows, 8), Sampler(samplings, SMALL, CPU), (), "reject", 4
    )
    tokens, probs = [torch.zeros(rows, dtype=torch.int64)], [torch.zeros(rows, SMALL, dtype=torch.float64)]
    q = DRAFT_LAW.repeat(rows, 1)
    for _ in range(3):
        token = torch.multinomial(q, 1)[:, 0]
        tokens.append(token)
        probs.append(q if conditional else DRAFT_LAW.repeat(rows, 1))
        q = q.scatter(1, token[:, None], 0.0)
        q = q / q.sum(1, keepdim=True)
    draft = Draft(
        tokens=torch.stack(tokens, 1),
        parents=torch.tensor([-1, 0, 0, 0]).repeat(rows, 1),
        valid=torch.ones(rows, 4, dtype=torch.bool),
        depth=1,
        stops=(Stop.LENGTH,) * rows,
        probs=torch.stack(probs, 1),
    )
    logits = TARGET_LAW.log().repeat(rows, 4, 1)
    verdict = clip(reject(draft, logits, place_chain(state.lengths, 4, 4), state), draft, state)
    return verdict.next_token[:, None].tolist()


def test_siblings_drawn_without_replacement_keep_the_distribution() -> None:
    assert misfit(reject_siblings(conditional=True), TARGET_LAW) < CHANCE


def test_siblings_scored_as_if_drawn_independently_are_found_out() -> None:
    assert misfit(reject_siblings(conditional=False), TARGET_LAW) > BROKEN
