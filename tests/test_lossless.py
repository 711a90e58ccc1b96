"""The promise: with every drafter, alone or in a batch, the text is the one the model writes by itself."""

import sys
from collections.abc import Sequence

import pytest
import torch

from kangaroo.decode import collect, decode, prefill, start, step
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.drafters.none import NoDrafter
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from oracle import EVERYTHING, GREEDY, GREEDY_PENALISED, oracle
from runs import COPYING, DRAFTERS, PROMPTS, Run, drive, generate, new_run, record, requests
from scripted import ScriptedDrafter
from tiny import EXIT, VOCAB, build, make_adapter, target

FAMILIES = ("llama", "mistral", "granite")  # mistral's window is shorter than the prompts, granite scales its logits
# Beside those, the ones whose logits, windows or layers are unlike theirs.
MANY_FAMILIES = ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "phi3", "qwen3", "starcoder2")
SAMPLINGS = {"greedy": GREEDY, "greedy-penalised": GREEDY_PENALISED, "sampled": EVERYTHING}
TOKENS = 16


def expect(family: str, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = TOKENS, eos: Sequence[int] = ()):
    return [oracle(target(family).model, prompt, sampling, n, eos) for prompt in prompts]


def scripted(family: str, prompts: Sequence[Sequence[int]], sampling: Sampling, counts: Sequence[int], **kwargs: int):
    texts = [[*p, *oracle(target(family).model, p, sampling, 40)] for p in prompts]
    return ScriptedDrafter(texts, counts, kwargs.pop("depth", 4), VOCAB, **kwargs)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_models_own_alone_and_in_a_ragged_batch(family: str, drafter: str, sampling: Sampling) -> None:
    model, want = target(family), expect(family, PROMPTS, sampling)
    batch = generate(model, DRAFTERS[drafter](model), requests(PROMPTS, sampling, TOKENS))
    assert batch.texts == want
    alone = [generate(model, DRAFTERS[drafter](model), requests([p], sampling, TOKENS)) for p in PROMPTS]
    assert [run.texts[0] for run in alone] == want
    # Not even the drafts depend on the neighbours, so neither does the speed.
    assert batch.rounds == [run.rounds[0] for run in alone]
    assert batch.drafted == [run.drafted[0] for run in alone]
    if drafter not in {"none", *COPYING}:
        assert any(n > 0 for n in batch.accepted), "identity proves little when nothing is accepted"
        assert sum(batch.accepted) < sum(map(sum, batch.drafted)), "nor when nothing is refused"


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", MANY_FAMILIES)
def test_text_is_the_models_own_in_families_of_every_kind(family: str, drafter: str, sampling: Sampling) -> None:
    """Scaled and soft-capped logits, windows shorter than the prompts, experts, biases, norms in unusual places."""
    model = target(family)
    run = generate(model, DRAFTERS[drafter](model), requests(PROMPTS, sampling, 10))
    assert run.texts == expect(family, PROMPTS, sampling, 10)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("branches", [1, 3], ids=["chain", "tree"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_count_of_acceptance_from_none_to_all(family: str, branches: int, sampling: Sampling) -> None:
    counts, n = (0, 4, 1, 3, 2), 20
    for prompts in ([PROMPTS[0]], PROMPTS):
        drafter = scripted(family, prompts, sampling, counts, branches=branches)
        run = generate(target(family), drafter, requests(prompts, sampling, n))
        assert run.texts == expect(family, prompts, sampling, n)
        for row in run.rounds:  # every row had every count, the last round being cut by max_tokens
            assert [len(emitted) - 1 for emitted in row[:-1]] == [counts[r % 5] for r in range(len(row) - 1)]
            assert {len(emitted) - 1 for emitted in row[:-1]} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_rows_of_one_batch_may_sample_differently(drafter: str) -> None:
    model, samplings = target("llama"), (GREEDY, EVERYTHING, Sampling(temperature=1.3, min_p=0.05, seed=-4))
    work = [Request(p, s, TOKENS) for p, s in zip(PROMPTS, samplings, strict=True)]
    want = [oracle(model.model, p, s, TOKENS) for p, s in zip(PROMPTS, samplings, strict=True)]
    assert generate(model, DRAFTERS[drafter](model), work).texts == want


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_rejection_sampling_is_greedy_decoding(drafter: str) -> None:
    model = target("llama")
    run = generate(model, DRAFTERS[drafter](model), requests(PROMPTS, GREEDY_PENALISED, TOKENS), rule="reject")
    assert run.texts == expect("llama", PROMPTS, GREEDY_PENALISED)


@pytest.mark.parametrize("variant", ["own-head", "full-layer", "mlp-only"])
def test_adapter_variants_are_lossless(variant: str) -> None:
    model = target("llama")
    adapter = make_adapter(model, variant=variant)
    drafter = Kangaroo(model, adapter, EXIT, ChainConfig(max_draft=3, threshold=0))
    assert generate(model, drafter, requests(PROMPTS, EVERYTHING, TOKENS)).texts == expect("llama", PROMPTS, EVERYTHING)


@pytest.mark.parametrize("exit_layer", [0, 1, 4])
def test_any_exit_layer_is_lossless(exit_layer: int) -> None:
    model = target("mistral")
    drafter = Kangaroo(model, make_adapter(model, exit_layer), exit_layer, ChainConfig(max_draft=3, threshold=0))
    assert generate(model, drafter, requests(PROMPTS, GREEDY, TOKENS)).texts == expect("mistral", PROMPTS, GREEDY)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_prompts_longer_than_a_prefill_chunk(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["kangaroo.decode"], "PREFILL_CHUNK", 4)
    model = target("mistral")
    whole = [[(7 * i) % VOCAB for i in range(n)] for n in (4, 5, 17)]
    run = generate(model, DRAFTERS[drafter](model), requests(whole, GREEDY, 8))
    assert run.texts == expect("mistral", whole, GREEDY, 8)


# --- ends


@pytest.mark.parametrize("branches", [1, 2], ids=["chain", "tree"])
def test_end_of_sequence_wherever_it_falls_in_a_draft(branches: int) -> None:
    text = expect("llama", PROMPTS[:1], EVERYTHING, 12)[0]
    for counts in ((4,), (2,), (0,)):
        for end in text:
            eos = (end, VOCAB - 1 if end != VOCAB - 1 else 0)
            drafter = scripted("llama", PROMPTS[:1], EVERYTHING, counts, branches=branches)
            run = generate(target("llama"), drafter, requests(PROMPTS[:1], EVERYTHING, 12), eos)
            assert run.texts[0] == text[: min(text.index(e) for e in eos if e in text) + 1]


@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_several_end_tokens_end_rows_at_different_times(family: str, drafter: str, sampling: Sampling) -> None:
    model, free = target(family), expect(family, PROMPTS, sampling)
    eos = (free[0][0], free[1][4], free[2][9])  # the first row ends at its very first token
    want = expect(family, PROMPTS, sampling, eos=eos)
    assert len(want[0]) == 1
    assert len({len(text) for text in want}) > 1
    for rows in ([0], [1], [0, 1, 2]):
        work = requests([PROMPTS[i] for i in rows], sampling, TOKENS)
        assert generate(model, DRAFTERS[drafter](model), work, eos).texts == [want[i] for i in rows]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_max_tokens_is_exact_and_each_rows_own(drafter: str) -> None:
    model = target("granite")
    lengths = (1, 2, 7)
    work = [Request(p, EVERYTHING, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    want = [oracle(model.model, p, EVERYTHING, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    assert [len(text) for text in want] == [1, 2, 7]
    assert generate(model, DRAFTERS[drafter](model), work).texts == want


@pytest.mark.parametrize("branches", [1, 2], ids=["chain", "tree"])
def test_a_draft_that_would_overshoot_is_cut_at_max_tokens(branches: int) -> None:
    for n in range(1, 11):
        drafter = scripted("llama", PROMPTS, GREEDY, (4,), branches=branches)
        assert generate(target("llama"), drafter, requests(PROMPTS, GREEDY, n)).texts == expect(
            "llama", PROMPTS, GREEDY, n
        )


@pytest.fixture(scope="module")
def short() -> Target:
    return Target(build("llama", max_position_embeddings=16))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_context_is_filled_to_its_last_token(short: Target, drafter: str) -> None:
    work = [Request(p, GREEDY, 99) for p in ([5] * 15, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2])]
    run = generate(short, DRAFTERS[drafter](short), work)
    assert [len(text) for text in run.texts] == [1, 6, 15]
    assert run.texts == [oracle(short.model, r.prompt, GREEDY, 99) for r in work]


def test_drafts_past_the_context_are_cut(short: Target) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    want = oracle(short.model, prompt, GREEDY, 99)
    for branches in (1, 2):
        drafter = ScriptedDrafter([[*prompt, *want]], (4,), 4, VOCAB, branches)
        assert generate(short, drafter, requests([prompt], GREEDY, 99)).texts == [want]


# --- rows that come and go


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_given_to_a_new_request_between_rounds(family: str, drafter: str) -> None:
    model, draft = target(family), DRAFTERS[drafter](target(family))
    newcomers = [[8, 8, 9], [4], [7] * 12, PROMPTS[1], [31, 5]]
    work = [Request(p, EVERYTHING, n) for p, n in zip(PROMPTS, (3, 12, 1), strict=True)]
    state = start(model, draft, work, capacity=20)
    running: list[tuple[Sequence[int], Run]] = [(p, new_run(1)) for p in PROMPTS]
    finished: list[tuple[Sequence[int], Run]] = []
    while bool(state.active.any()):
        done = step(model, draft, state)
        for row, (prompt, run) in enumerate(running):
            record(run, done.emitted[row : row + 1], done.drafted[row : row + 1])
            if done.emitted[row] and not state.active[row]:
                finished.append((prompt, run))
        for row in (~state.active).nonzero()[:, 0].tolist():
            if newcomers:
                prompt = newcomers.pop()
                state.assign(row, Request(prompt, EVERYTHING, 7))
                prefill(model, draft, state, rows=torch.tensor([row]))
                running[row] = (prompt, new_run(1))
    assert len(finished) == 8
    for prompt, run in finished:
        text = run.texts[0]
        assert text == oracle(model.model, prompt, EVERYTHING, len(text))
        # A newcomer finds nothing of the row's past: it is drafted for as it would be on its own.
        alone = generate(model, DRAFTERS[drafter](model), requests([prompt], EVERYTHING, len(text)))
        assert (run.rounds, run.drafted) == (alone.rounds, alone.drafted)


def test_several_rows_are_given_away_at_once() -> None:
    model, draft = target("mistral"), DRAFTERS["kangaroo-fixed"](target("mistral"))
    state = start(model, draft, [Request(p, GREEDY, n) for p, n in zip(PROMPTS, (2, 14, 2), strict=True)])
    run = new_run(3)
    while int(state.active.sum()) > 1:
        done = step(model, draft, state)
        record(run, done.emitted, done.drafted)
    fresh = {2: [9, 9, 8, 1, 7, 7], 0: [6, 5]}
    for row, prompt in fresh.items():
        state.assign(row, Request(prompt, EVERYTHING, 5))
        run.texts[row] = []
    prefill(model, draft, state, rows=torch.tensor([2, 0]))
    drive(model, draft, state, run)
    assert run.texts[1] == oracle(model.model, PROMPTS[1], GREEDY, 14)
    assert [run.texts[row] for row in fresh] == [oracle(model.model, p, EVERYTHING, 5) for p in fresh.values()]


@pytest.mark.parametrize("drafter", ["none", "kangaroo", "kangaroo-tree"])
def test_a_row_finished_from_outside_is_frozen_and_the_others_go_on(drafter: str) -> None:
    model, draft = target("llama"), DRAFTERS[drafter](target("llama"))
    state = start(model, draft, requests(PROMPTS, GREEDY, TOKENS))
    done = step(model, draft, state)
    run = new_run(3)
    record(run, done.emitted, done.drafted)
    state.finish(1)
    kept = list(run.texts[1])
    drive(model, draft, state, run)
    want = expect("llama", PROMPTS, GREEDY)
    assert run.texts == [want[0], kept, want[2]]
    assert kept == want[1][: len(kept)]


def test_rounds_are_collected_into_texts() -> None:
    model, eos = target("llama"), (expect("llama", PROMPTS, GREEDY)[0][3],)
    drafter: Drafter = NoDrafter()
    state = start(model, drafter, requests(PROMPTS, GREEDY, TOKENS), eos=eos)
    got = collect(decode(model, drafter, state), len(PROMPTS))
    assert got == expect("llama", PROMPTS, GREEDY, eos=eos)


def test_samples_of_one_prompt_differ_by_index_and_by_seed_only() -> None:
    model = target("llama")
    samplings = [Sampling(temperature=1.0, seed=s, index=i) for s, i in ((0, 0), (0, 1), (1, 0), (0, 0))]
    run = generate(model, NoDrafter(), [Request(PROMPTS[0], s, TOKENS) for s in samplings])
    assert run.texts[0] == run.texts[3]
    assert len({tuple(text) for text in run.texts}) == 3
