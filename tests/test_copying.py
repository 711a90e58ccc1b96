"""Drafters that copy: what they find, and that copies change nothing but the number of rounds."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_model import save_chat_model
from kangaroo.decode import start, step
from kangaroo.decoder import load
from kangaroo.drafters.copying.llma import BREAK, LLMA, LLMAConfig, new_index
from kangaroo.drafters.copying.ngrams import NgramIndex
from kangaroo.drafters.copying.prompt_lookup import LookupConfig, PromptLookup
from kangaroo.drafters.kangaroo.lookup import KangarooLookup, KangarooLookupConfig, Odds
from kangaroo.errors import ConfigError, DataError
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.tree import Stop
from oracle import EVERYTHING, GREEDY, oracle
from runs import DRAFTERS, PROMPTS, generate, requests
from tiny import EXIT, make_adapter, target

# Few tokens are likely, so texts repeat themselves: sometimes as a copy foretells, sometimes not.
FEW = dict.fromkeys((3, 5, 8), 9.0)
REPETITIVE = {
    "greedy": Sampling(logit_bias=FEW),
    "sampled": Sampling(logit_bias=FEW, temperature=0.8, top_p=0.95, seed=3),
    "hot, penalised": Sampling(logit_bias=FEW, temperature=1.2, repetition_penalty=1.05, frequency_penalty=0.1, seed=4),
}


# --- the index


texts = st.lists(st.integers(0, 3), max_size=40)


@given(texts, texts, st.sampled_from(["first", "latest"]))
def test_an_index_finds_what_a_scan_finds(text: list[int], tail: list[int], keep: str) -> None:
    index = NgramIndex(2, 4, keep)  # type: ignore[arg-type]
    index.extend(text[:7])
    index.extend(text[7:])
    ends = {
        length: [end for end in range(length, len(text) + 1) if text[end - length : end] == tail[len(tail) - length :]]
        for length in (4, 3, 2)
        if length <= len(tail)
    }
    length = next((length for length in ends if ends[length]), 0)
    expected = (length, ends[length][0 if keep == "first" else -1]) if length else (0, 0)
    assert index.find(tail) == expected


@given(texts, st.integers(0, 3), st.integers(1, 9))
def test_a_looping_copy_begins_like_one_that_ends_with_the_text(text: list[int], pending: int, count: int) -> None:
    index = NgramIndex(1, 3, "latest")
    index.extend(text)
    match, copy = index.continuation(pending, count)
    assert (match > 0) == (pending in text)
    looped = index.continuation(pending, count, loop=True)[1]
    assert looped[: len(copy)] == copy
    assert len(looped) == (count if match else 0)
    whole = [*text, pending, *looped]
    if match:
        period = len(text) + 1 - index.find([*text, pending][-3:])[1]
        assert all(whole[i] == whole[i - period] for i in range(len(text) + 1, len(whole)))


def test_a_query_costs_the_same_however_long_the_text_is() -> None:
    def seconds(size: int) -> float:
        index = NgramIndex(1, 3, "latest")
        index.extend([(i * i) % 997 for i in range(size)])
        began = time.thread_time()  # of this thread alone: others use the machine
        for i in range(2000):
            index.extend([i % 997])
            index.continuation(i % 991, 10)
        return time.thread_time() - began

    assert seconds(30_000) < 4 * seconds(1_000)  # a scan would take thirty times as long


# --- losslessness


@pytest.mark.parametrize("sampling", REPETITIVE.values(), ids=REPETITIVE)
@pytest.mark.parametrize("drafter", ["prompt-lookup", "llma", "kangaroo+lookup"])
def test_copies_are_accepted_and_refused_and_the_text_stays(drafter: str, sampling: Sampling) -> None:
    model = target("llama")
    prompts = [[3, 5, 8, 3, 5, 5, 8, 8, 3], [5, 3, 3, 8, 5, 8, 3], [8]]
    run = generate(model, DRAFTERS[drafter](model), requests(prompts, sampling, 30))
    assert run.texts == [oracle(model.model, p, sampling, 30) for p in prompts]
    drafted = [count for row in run.drafted for count in row]
    pairs = {(accepted > 0, accepted < count) for accepted, count in zip(run.accepted, drafted, strict=True) if count}
    assert (True, False) in pairs or (True, True) in pairs
    assert (False, True) in pairs or (True, True) in pairs


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
def test_references_are_copied_from_with_every_count_of_acceptance(sampling: Sampling) -> None:
    model, config = target("mistral"), LLMAConfig(longest=3, max_draft=4)
    want = [oracle(model.model, p, sampling, 24) for p in PROMPTS]
    references = new_index(config)
    for text in want:
        for at in range(24):  # pieces of the text that go wrong after one to seven tokens
            references.extend([BREAK, *text[at : at + 1 + at * 5 % 7], 96, 95, 96, 95])
    run = generate(model, LLMA(config, references), requests(PROMPTS, sampling, 24))
    assert run.texts == want
    assert {0, 1, 2, 3, 4} <= set(run.accepted)


@pytest.mark.parametrize("rule", ["match", "reject"])
@torch.inference_mode()
def test_a_batch_may_copy_in_one_row_and_draft_in_another(rule: str) -> None:
    model = target("llama")
    config = KangarooLookupConfig(max_draft=3, threshold=0, max_copy=6)
    drafter = KangarooLookup(model, make_adapter(model), EXIT, config)
    prompts = [[3, 5, 8, 9] * 5, [2, 7, 1]]
    state = start(model, drafter, requests(prompts, Sampling(temperature=0.7, seed=1), 20), rule=rule)
    draft = drafter.draft(state)
    assert draft.tokens[0, 1:].tolist() == [3, 5, 8, 9, 3, 5]
    assert draft.valid.tolist() == [[True] * 7, [True] * 4 + [False] * 3]
    if rule == "reject":
        assert draft.probs is not None
        assert torch.equal(draft.probs[0, 1:].argmax(-1), draft.tokens[0, 1:])
        assert draft.probs[0, 1:].amax(-1).eq(1).all()
        assert draft.probs[1, 1:4].amax(-1).lt(1).all()


# --- what is copied


def drafts(drafter: PromptLookup | LLMA, prompt: Sequence[int], bias: dict[int, float], rounds: int) -> list[list[int]]:
    """What is drafted in each of the first rounds of a model that is made to say one thing."""
    model = target("llama")
    seen = []
    state = start(model, drafter, [Request(prompt, Sampling(logit_bias=bias), 20)])
    for _ in range(rounds):
        seen.append(drafter.draft(state).tokens[0, 1:].tolist())
        step(model, drafter, state)
    return seen


def test_prompt_lookup_takes_the_latest_of_the_longest_matches() -> None:
    text = [1, 2, 3, 40, 9, 1, 2, 3, 50, 7, 2, 3, 60, 9, 3, 70, 8, 1, 2, 3]
    found = drafts(PromptLookup(LookupConfig(max_draft=2)), text, {}, 1)
    assert found == [[50, 7]]
    assert drafts(PromptLookup(LookupConfig(max_draft=9)), [4, 4], {}, 1) == [[4]]
    assert drafts(PromptLookup(LookupConfig()), [1, 2, 3], {}, 1) == [[]]


def test_llma_matches_generated_tokens_against_the_prompt_and_takes_the_first_occurrence() -> None:
    prompt = [30, 11, 12, 13, 30, 21, 22, 9]
    found = drafts(LLMA(LLMAConfig(max_draft=3), None), prompt, {30: 1e6}, 3)
    assert found[0] == []  # nothing has been generated
    assert found[1] == [11, 12, 13]
    assert found[2] == [11, 12, 13]  # "30 30" is nowhere, so one token has to do


def test_no_copy_runs_from_one_reference_into_the_next() -> None:
    config = LLMAConfig(max_draft=5)
    references = new_index(config)
    for document in ([30, 11], [12, 13], [30, 31, 32, 33]):
        references.extend([BREAK, *document])
    assert drafts(LLMA(config, references), [1, 2], {30: 1e6}, 2)[1] == [11]


def test_odds_turn_to_what_has_paid() -> None:
    config = KangarooLookupConfig(max_draft=4, max_copy=8)
    odds = Odds(config, draft_cost=0.2)
    assert odds.prefers_copy(5, 8)
    assert not odds.prefers_copy(1, 8)
    for _ in range(20):
        odds.learn(5, 8, 1)
        odds.learn(1, 8, 9)
    assert not odds.prefers_copy(5, 8)
    assert odds.prefers_copy(1, 8)
    for _ in range(100):
        odds.learn(0, 4, 5)
    assert not odds.prefers_copy(5, 8)


def test_a_miss_drafts_nothing_and_says_so() -> None:
    model = target("llama")
    state = start(model, drafter := PromptLookup(LookupConfig()), requests([[1, 2, 3], [5, 5]], GREEDY, 9))
    draft = drafter.draft(state)
    assert draft.stops == (Stop.NOTHING, Stop.LENGTH)
    assert draft.valid.tolist() == [[True, False], [True, True]]


# --- bad input


@pytest.mark.parametrize(
    ("drafter", "settings"),
    [
        ("prompt-lookup", {"shortest": 0}),
        ("prompt-lookup", {"shortest": 4}),
        ("prompt-lookup", {"max_draft": 0}),
        ("llma", {"trigger": 0}),
        ("llma", {"longest": 0}),
        ("kangaroo+lookup", {"longest": 0}),
        ("kangaroo+lookup", {"node_cost": -1}),
    ],
)
def test_settings_that_cannot_be_are_refused(chat: Path, drafter: str, settings: dict[str, int]) -> None:
    files = {"adapter": chat / "adapter"} if drafter == "kangaroo+lookup" else {}
    with pytest.raises(ConfigError):
        load(chat / "target", drafter=drafter, dtype=torch.float64, **files, **settings)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_references_come_from_a_file_and_must_fit_the_context(chat: Path, tmp_path: Path) -> None:
    path = tmp_path / "references.txt"
    path.write_text("Where? The answer is here.\n\n\nAnother document.")
    decoder = load(chat / "target", drafter="llma", dtype=torch.float64, references=path)
    plain = decoder.plain().generate(["Where?"], max_tokens=12)
    assert decoder.generate(["Where?"], max_tokens=12)[0].tokens == plain[0].tokens
    path.write_text("far too long " * 4000)
    with pytest.raises(DataError, match="longer than the target's context"):
        load(chat / "target", drafter="llma", dtype=torch.float64, references=path)
