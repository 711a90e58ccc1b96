"""The checker itself: it must see a difference when there is one."""

from pathlib import Path

import torch

import kangaroo
from chat_model import save_chat_model
from kangaroo.bench.check import CheckReport, check, expect, find_divergence
from kangaroo.bench.compare import compare, without_end
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.decoder import Decoder
from kangaroo.drafters.kangaroo.costs import Costs
from kangaroo.drafters.none import NoDrafter
from kangaroo.sampling import Sampling
from kangaroo.state import State
from kangaroo.tree import Draft
from kangaroo.trial import Exactness


class LyingTarget:
    """A drafter that corrupts the text, as a faulty engine would: it swaps the pending token."""

    def __new__(cls) -> NoDrafter:  # a NoDrafter whose draft is wrong
        drafter = NoDrafter()
        honest = drafter.draft

        def lie(state: State) -> Draft:
            if state.rounds == 5:
                state.tokens.scatter_(1, state.lengths[:, None], (state.pending + 1) % 50)
            return honest(state)

        drafter.draft = lie  # type: ignore[method-assign]
        return drafter


def test_a_corrupted_text_is_reported_with_its_first_difference(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path)
    decoder = kangaroo.load(folder / "target", drafter="none", dtype=torch.float32)
    broken = Decoder(decoder.target, LyingTarget, decoder.tokenizer, ())
    prompts = [decoder.tokenizer.encode("Where would you")]
    expected = expect(decoder, prompts, [Sampling()], max_tokens=12)
    report = check(broken, expected, batches=[1])
    assert report.problem == "1 of 1 answers differ"
    found = report.differences[0]
    assert found.position >= 4
    assert found.float64 == found.expected != found.got
    assert found.gap > 0


def test_a_check_in_which_nothing_was_accepted_fails() -> None:
    report = CheckReport(Exactness("bitwise", "tried"), tokens=5000, answers=3)
    report.rounds.add(4, 0)
    assert report.problem is not None
    report.rounds.add(4, 2)
    assert report.problem is None


def test_examining_a_sampled_draw_repeats_it(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path)
    decoder = kangaroo.load(folder / "target", drafter="none", dtype=torch.float64)
    sampling = Sampling(temperature=0.8, seed=1)
    prompt = decoder.tokenizer.encode("I need")
    tokens = decoder.generate(["I need"], max_tokens=6, sampling=sampling)[0].tokens
    found = find_divergence(decoder, prompt, tokens, tokens[:4], sampling)
    assert (found.position, found.expected, found.got, found.float64) == (4, tokens[4], -1, tokens[4])


def test_comparing_counts_both_sides_alike(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path)
    decoder = kangaroo.load(folder / "target", drafter="early-exit", exit_layer=1, dtype=torch.float64, threshold=0.02)
    barred = without_end(Sampling(), decoder.eos)
    result = compare(decoder.plain(), decoder, ["Where", "The answer is"], max_tokens=16, sampling=barred)
    assert result.identical
    assert all(len(pair.method.tokens) == 16 for pair in result.pairs)
    assert all(pair.baseline.stats.compression_rate == 1 for pair in result.pairs)
    assert result.compression_rate > 1
    assert result.speedup > 0


def test_the_bound_is_one_for_plain_rounds_and_grows_with_acceptance() -> None:
    costs = Costs(full_step=1.0, shallow=0.0, adapter=0.0, head=0.0, verify={1: 1.0, 2: 1.0, 3: 1.1})
    assert costs.bound([0, 0], 2) == 1.0
    assert costs.bound([2, 2], 6) == 6 / 2.2


def test_evaluation_prompts_cover_six_kinds_in_both_splits_and_the_split_is_a_hash() -> None:
    prompts = read_prompts()
    assert len(prompts) >= 60
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    for split in ("development", "held-out"):
        kinds = {prompt.kind for prompt in read_prompts(split=split)}
        assert kinds == {"chat", "task-dialogue", "word-problem", "code", "story", "summary"}
    assert len({prompt.kind for prompt in interleave_kinds(read_prompts(split="held-out"))[:6]}) == 6
