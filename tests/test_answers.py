"""What a call returns: samples, streams, reasons, counts; and what it refuses."""

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kangaroo
from chat_model import save_chat_model
from kangaroo import Completion, Decoder, Logprobs, Piece, Sampling
from kangaroo.arguments import spread
from kangaroo.errors import ConfigError, DataError, KangarooError

PROMPTS = ["Where would", "I need 3 tickets", "The"]
HOT = Sampling(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return kangaroo.load(folder / "target", adapter=folder / "adapter", dtype="float64", threshold=0.02)


@pytest.fixture(scope="module")
def eager(folder: Path) -> Decoder:
    """Drafts by the target itself: whole rounds are accepted, so that much falls inside them."""
    return kangaroo.load(folder / "target", drafter="draft-model", draft_model=folder / "target", dtype="float64")


def plain_facts(answer: Completion) -> tuple[object, ...]:
    """What drafting may not change."""
    return answer.text, answer.tokens, answer.finish_reason, answer.stopped_by, answer.prompt_tokens


# --- prompts and samplings


def test_text_and_its_token_ids_are_the_same_prompt(decoder: Decoder) -> None:
    ids = decoder.tokenizer.encode(PROMPTS[0])
    answers = decoder.generate([PROMPTS[0], ids, torch.tensor(ids)], max_tokens=9)
    assert [a.tokens for a in answers] == [answers[0].tokens] * 3
    assert {a.prompt_tokens for a in answers} == {len(ids)}
    assert "".join(piece.text for piece in decoder.stream(ids, max_tokens=9)) == answers[0].text


def test_every_prompt_may_have_a_sampling_of_its_own(decoder: Decoder) -> None:
    samplings = [Sampling(), HOT, Sampling(temperature=0.7, top_k=20, seed=1)]
    together = decoder.generate(PROMPTS, sampling=samplings, max_tokens=16)
    for prompt, sampling, answer in zip(PROMPTS, samplings, together, strict=True):
        alone = decoder.plain().generate([prompt], sampling=sampling, max_tokens=16)[0]
        assert plain_facts(answer) == plain_facts(alone)


def test_several_answers_to_every_prompt_lie_prompt_by_prompt(decoder: Decoder) -> None:
    answers = decoder.generate(PROMPTS[:2], n=3, sampling=Sampling(temperature=1.0, seed=5, index=4), max_tokens=12)
    for place, answer in enumerate(answers):
        own = Sampling(temperature=1.0, seed=5, index=4 + place % 3)
        assert answer.tokens == decoder.generate([PROMPTS[place // 3]], sampling=own, max_tokens=12)[0].tokens
    assert len({tuple(answer.tokens) for answer in answers[:3]}) == 3


def test_a_prompt_asked_twice_in_a_call_is_answered_in_two_ways(decoder: Decoder) -> None:
    same = decoder.generate([PROMPTS[0], PROMPTS[2], PROMPTS[0]], sampling=HOT, max_tokens=12)
    assert same[0].tokens != same[2].tokens
    for place in (0, 1):
        alone = decoder.generate([[PROMPTS[0], PROMPTS[2]][place]], sampling=HOT, max_tokens=12)[0]
        assert same[place].tokens == alone.tokens


def test_the_same_prompt_under_two_processors_is_not_the_same(decoder: Decoder) -> None:
    def first(prompt: Sequence[int], output: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        return scores

    def second(prompt: Sequence[int], output: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        return scores * 1.0

    alone = decoder.generate(["The"], sampling=HOT, max_tokens=9)[0]
    for processors, same in (([first, second], True), ([first, first], False)):
        a, b = decoder.generate(["The", "The"], sampling=HOT, max_tokens=9, processor=processors)
        assert a.tokens == alone.tokens
        assert (b.tokens == alone.tokens) == same


def test_indices_move_only_where_prompt_and_sampling_are_the_same() -> None:
    def indices(pairs: Sequence[tuple[int, Sampling]], n: int = 1) -> list[list[int]]:
        found = spread([prompt for prompt, _ in pairs], [sampling for _, sampling in pairs], n)
        return [[sampling.index for sampling in group] for group in found]

    zero, one = Sampling(temperature=1.0), Sampling(temperature=1.0, index=1)
    assert indices([(7, zero), (7, zero), (8, zero)]) == [[0], [1], [0]]
    assert indices([(7, zero), (7, zero), (7, one)]) == [[0], [2], [1]]  # the pair that is alone keeps its index
    assert indices([(7, zero), (7, zero)], n=3) == [[0, 1, 2], [3, 4, 5]]
    assert indices([(7, zero), (7, Sampling(temperature=1.0, seed=1))]) == [[0], [0]]


# --- why and how answers end


def test_completions_say_what_stopped_them(eager: Decoder) -> None:
    whole = eager.generate([PROMPTS[0]], max_tokens=30)[0]
    assert (whole.finish_reason, whole.stopped_by, len(whole.tokens)) == ("length", None, 30)
    stop, token = whole.text[5:8], whole.tokens[7]
    by_text = eager.generate([PROMPTS[0]], max_tokens=30, stop=stop)[0]
    assert (by_text.finish_reason, by_text.stopped_by) == ("stop", stop)
    by_token = eager.generate([PROMPTS[0]], max_tokens=30, stop_token_ids=[token])[0]
    assert (by_token.finish_reason, by_token.stopped_by) == ("stop", token)
    assert by_token.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    bias = Sampling(logit_bias={eager.eos[0]: 1e9})
    ended = eager.generate([PROMPTS[0]], max_tokens=5, sampling=bias)[0]
    assert (ended.finish_reason, ended.stopped_by, ended.text) == ("stop", eager.eos[0], "")
    ignored = eager.generate([PROMPTS[0]], max_tokens=5, sampling=bias, ignore_eos=True)[0]
    assert (ignored.finish_reason, ignored.tokens) == ("length", [eager.eos[0]] * 5)


def test_min_tokens_holds_every_end_back(eager: Decoder) -> None:
    plain = eager.plain()
    whole = plain.generate([PROMPTS[0]], max_tokens=30)[0]
    settings: dict[str, Any] = {"stop": [whole.text[3:5]], "stop_token_ids": whole.tokens[2:4], "max_tokens": 30}
    early = plain.generate([PROMPTS[0]], **settings)[0]
    late = plain.generate([PROMPTS[0]], min_tokens=12, **settings)[0]
    assert len(early.tokens) < 12 < len(late.tokens)
    assert not set(late.tokens[:12]) & set(whole.tokens[2:4])
    assert plain_facts(eager.generate([PROMPTS[0]], min_tokens=12, **settings)[0]) == plain_facts(late)


def test_a_processor_is_heard_by_every_drafter(folder: Path, decoder: Decoder, eager: Decoder) -> None:
    def no_spaces(prompt: Sequence[int], output: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        scores[blank] = -torch.inf
        return scores

    blank = [id for id in range(decoder.target.vocab_size) if " " in decoder.tokenizer.decode([id])]
    want = decoder.plain().generate(PROMPTS, max_tokens=12, processor=[no_spaces, None, no_spaces])
    assert " " not in want[0].text + want[2].text
    for each in (decoder, eager):
        got = each.generate(PROMPTS, max_tokens=12, processor=[no_spaces, None, no_spaces])
        assert [plain_facts(a) for a in got] == [plain_facts(a) for a in want]


def test_logprobs_come_if_asked_for_and_are_those_of_plain_decoding(decoder: Decoder) -> None:
    for asked in (2, Logprobs(2, raw=True)):
        got = decoder.generate(PROMPTS, sampling=HOT, max_tokens=12, logprobs=asked)
        want = decoder.plain().generate(PROMPTS, sampling=HOT, max_tokens=12, logprobs=asked)
        assert any(answer.stats.accepted for answer in got)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.logprobs is not None
            assert theirs.logprobs is not None
            assert [p.token for p in mine.logprobs] == mine.tokens
            assert [p.logprob for p in mine.logprobs] == pytest.approx([p.logprob for p in theirs.logprobs])
            assert all(len(p.top) == 2 and p.top[0][1] >= p.top[1][1] for p in mine.logprobs)
    assert decoder.generate(["The"], max_tokens=2)[0].logprobs is None


# --- streams


def check_pieces(pieces: Sequence[Piece], answer: Completion) -> None:
    assert [piece.token for piece in pieces] == answer.tokens
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert [piece.drafted for piece in pieces] == answer.drafted
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [answer.finish_reason]


def test_every_token_is_in_one_piece_and_held_back_text_is_in_the_last(decoder: Decoder) -> None:
    whole = decoder.generate(["Where would"], max_tokens=40)[0]
    held_back = [whole.text[-1] + "@"]  # its beginning is held back to the very end
    for sampling in (Sampling(), HOT, Sampling(temperature=2.0, seed=3)):
        for stop in ((), held_back):
            stream = decoder.stream("Where would", max_tokens=40, sampling=sampling, stop=stop)
            assert stream.completion is None
            pieces = list(stream)
            assert stream.completion is not None
            check_pieces(pieces, stream.completion)
            answer = decoder.generate(["Where would"], max_tokens=40, sampling=sampling, stop=stop)[0]
            assert plain_facts(answer) == plain_facts(stream.completion)
    assert any(piece.text == "" for piece in pieces), "tokens of unfinished characters have no text of their own"


def test_pieces_carry_logprobs_if_asked_for(decoder: Decoder) -> None:
    stream = decoder.stream("The", max_tokens=8, logprobs=1)
    pieces = list(stream)
    assert stream.completion is not None
    assert stream.completion.logprobs is not None
    assert [(p.logprob, p.top_logprobs) for p in pieces] == [(p.logprob, p.top) for p in stream.completion.logprobs]
    assert [p.logprob for p in decoder.stream("The", max_tokens=2)] == [None, None]


def counts(stats: kangaroo.Stats) -> tuple[object, ...]:
    return stats.rounds, stats.emitted, stats.drafted, stats.accepted, stats.lengths, stats.drafts


def test_two_streams_of_one_decoder_count_for_themselves(decoder: Decoder) -> None:
    alone = [list(decoder.stream(prompt, max_tokens=14)) for prompt in PROMPTS[:2]]
    want = [decoder.generate([prompt], max_tokens=14)[0] for prompt in PROMPTS[:2]]
    first, second = (decoder.stream(prompt, max_tokens=14) for prompt in PROMPTS[:2])
    got: list[list[Piece]] = [[], []]
    for one, other in zip(first, second, strict=False):
        got[0].append(one)
        got[1].append(other)
        decoder.generate(["The"], max_tokens=1)
    assert got == alone
    assert [counts(stream.stats) for stream in (first, second)] == [counts(answer.stats) for answer in want]


def test_pieces_of_a_batch_come_as_they_are_written(decoder: Decoder) -> None:
    stream = decoder.stream_batch(PROMPTS, n=2, sampling=HOT, max_tokens=20, stop=["e"])
    pieces = list(stream)
    answers = [answer for answer in stream.completions if answer is not None]
    assert len(answers) == len(stream.stats) == 6
    want = decoder.generate(PROMPTS, n=2, sampling=HOT, max_tokens=20, stop=["e"])
    for place, answer in enumerate(answers):
        check_pieces([piece for piece in pieces if piece.answer == place], answer)
        assert plain_facts(answer) == plain_facts(want[place])
        assert counts(stream.stats[place]) == counts(answer.stats) == counts(want[place].stats)
    order = [piece.answer for piece in pieces]
    assert order != sorted(order), "one after another is no batch"


@pytest.mark.parametrize("read", [0, 3])
@pytest.mark.parametrize("leave", ["close", "with", "forget"])
def test_a_closed_stream_frees_its_rows(
    decoder: Decoder, read: int, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[weakref.ref[kangaroo.KVCache]] = []
    make = type(decoder.target).new_cache

    def noted(*args: Any) -> kangaroo.KVCache:
        cache = make(*args)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(type(decoder.target), "new_cache", noted)
    stream: Any = decoder.stream("The", max_tokens=30)
    assert caches[0]() is not None
    for _ in range(read):
        next(stream)
    if leave == "with":
        with stream:
            pass
    elif leave == "close":
        stream.close()
    if leave == "forget":
        stream = None
    else:
        assert list(stream) == []
        assert stream.completion is None
        assert stream.stats.emitted >= read
    gc.collect()
    assert caches[0]() is None


def test_seconds_of_a_batch_are_shared_out_whole(decoder: Decoder) -> None:
    answers = decoder.generate(PROMPTS, max_tokens=15, stop=["e"])
    total = kangaroo.Stats.total(answer.stats for answer in answers)
    assert total.emitted == sum(len(answer.tokens) for answer in answers)
    assert total.rounds == len(total.lengths) == sum(answer.stats.rounds for answer in answers)
    assert len({answer.stats.prefill_seconds for answer in answers}) == 1
    assert all(answer.stats.decode_seconds > 0 for answer in answers)
    assert total.tokens_per_second == total.emitted / (total.prefill_seconds + total.decode_seconds) > 0


# --- misuse


@pytest.mark.parametrize(
    ("act", "kind", "named"),
    [
        (lambda d: d.generate(["x"], n=0), ConfigError, "n is a number"),
        (lambda d: d.generate(["x"], n=True), ConfigError, "n must be a whole number"),
        (lambda d: d.generate(["x"], n=10**9), ConfigError, "n is a number"),
        (lambda d: d.generate(["x"], ignore_eos="no"), ConfigError, "ignore_eos must be true or false"),
        (lambda d: d.generate(["x"], max_tokens=1.5), ConfigError, "max_tokens"),
        (lambda d: d.generate(["x"], max_tokens=4, min_tokens=5), ConfigError, "min_tokens"),
        (lambda d: d.generate(["x"], sampling=0.7), ConfigError, "sampling"),
        (lambda d: d.generate(["x"], sampling=[]), ConfigError, "0 entries for 1 prompt;"),
        (lambda d: d.generate(["x"], sampling=[HOT, HOT]), ConfigError, "2 entries for 1 prompt;"),
        (lambda d: d.generate(["x"], stop=[1]), ConfigError, "stop"),
        (lambda d: d.generate(["x"], stop=""), ConfigError, "stop"),
        (lambda d: d.generate(["x"], stop_token_ids="ab"), ConfigError, "stop_token_ids"),
        (lambda d: d.generate(["x"], stop_token_ids=[99999]), ConfigError, "stop_token_ids"),
        (lambda d: d.generate(["x"], logprobs=-1), ConfigError, "logprobs"),
        (lambda d: d.generate(["x"], logprobs=True), ConfigError, "logprobs"),
        (lambda d: d.generate(["x"], logprobs="2"), ConfigError, "logprobs"),
        (lambda d: d.generate(["x"], processor=3), ConfigError, "processor"),
        (lambda d: d.generate(["x"], processor=[lambda p, o, s: s[:3]]), ConfigError, "processor"),
        (lambda d: d.stream("x", processor=lambda p, o, s: s.float()), ConfigError, "float32"),
        (lambda d: d.generate([1, 2, 3]), DataError, "token ids"),
        (lambda d: d.generate(torch.tensor([1, 2])), DataError, "token ids"),
        (lambda d: d.generate([{"role": "user", "content": "x"}]), DataError, "conversation"),
        (lambda d: d.generate([[0.5]]), DataError, "token ids"),
        (lambda d: d.generate([[]]), DataError, "prompt"),
        (lambda d: d.generate([[99999]]), DataError, "vocabulary"),
        (lambda d: d.generate(5), DataError, "list of prompts"),
        (lambda d: d.stream_batch([]), DataError, "no prompts"),
    ],
)
def test_misuse_is_one_line_before_anything_is_written(
    decoder: Decoder, act: Callable[[Any], object], kind: type[KangarooError], named: str
) -> None:
    with pytest.raises(KangarooError) as caught:
        act(decoder)
    assert type(caught.value) is kind
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_decoder_says_what_it_is(decoder: Decoder) -> None:
    assert repr(decoder) == "Decoder(llama, 4 layers, float64 on cpu; drafter: kangaroo, threshold=0.02)"
    assert repr(decoder.plain()).endswith("drafter: none)")
