"""Several at once: threads with one Decoder, processes with one model and cache, streams that are not read to the end.

Texts are those of one alone, and every answer's counts are its own.
"""

import copy
import gc
import multiprocessing
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kangaroo import Sampling, load
from kangaroo.completion import Completion
from kangaroo.decoder import Decoder
from kangaroo.errors import ConfigError
from kangaroo.state import State

PROMPTS = ["Where would you like to eat tonight? Where would", "The answer is 42", "I need 3 tickets"]
SAMPLINGS = [Sampling(), Sampling(temperature=0.9, seed=3)]
DRAFTERS = {
    "kangaroo": {"threshold": 0.02},
    "kangaroo-tree": {},
    "prompt-lookup": {},
    "early-exit": {"exit_layer": 1, "threshold": 0.02},
}


@pytest.fixture(scope="module")
def decoder(chat: Path) -> Decoder:
    return load(str(chat / "target"), adapter=chat / "adapter", dtype=torch.float64, drafter="none")


def counted(answer: Completion) -> tuple[Any, ...]:
    """What does not depend on a clock."""
    stats = answer.stats
    return answer.text, answer.tokens, stats.emitted, stats.rounds, stats.drafted, stats.accepted


def answers(decoder: Decoder, turn: int = 0) -> list[tuple[Any, ...]]:
    """Texts of two lengths, so that rows of several threads are at different places."""
    found = decoder.generate(PROMPTS, sampling=SAMPLINGS[turn % 2], max_tokens=10 + 12 * turn)
    return [counted(answer) for answer in found]


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(jobs)

    def run(place: int) -> None:
        try:
            found[place] = jobs[place]()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_with_one_model(decoder: Decoder) -> None:
    decoders = [decoder.with_drafter(name, **given) for name, given in DRAFTERS.items()]
    jobs = [(one, turn) for turn in range(2) for one in decoders]
    alone = [answers(one, turn) for one, turn in jobs]
    assert all(rows[0][4] for rows in alone[:4]), "something is drafted"
    together = in_threads([lambda one=one, turn=turn: answers(one, turn) for one, turn in jobs])  # type: ignore[misc]
    assert together == alone


def test_a_thread_that_runs_the_model_itself(decoder: Decoder) -> None:
    """Its attention is the model's own all the while, and Kangaroo's bits are those of a pass all the while."""
    model, text = decoder.target.model, torch.tensor([decoder.tokenizer.encode(PROMPTS[0])])

    @torch.inference_mode()
    def forward() -> bytes:
        return b"".join(model(text, use_cache=False).logits.numpy().tobytes() for _ in range(20))

    alone = [forward(), answers(decoder)]
    assert in_threads([forward, lambda: answers(decoder), forward, lambda: answers(decoder)]) == alone * 2


def test_threads_that_share_a_decoder_and_take_turns(decoder: Decoder) -> None:
    """Streams, read piece by piece: every thread holds rows of its own while others begin and end theirs."""
    shared = decoder.with_drafter("kangaroo", threshold=0.02)

    def read(turn: int) -> tuple[Any, ...]:
        stream = shared.stream(PROMPTS[turn % 3], sampling=SAMPLINGS[turn % 2], max_tokens=30)
        text = "".join(piece.text for piece in stream)
        assert stream.completion is not None
        assert stream.completion.text == text
        return counted(stream.completion)

    alone = [read(turn) for turn in range(6)]
    assert in_threads([lambda turn=turn: read(turn) for turn in range(6)]) == alone  # type: ignore[misc]


def test_abandoned_streams_leave_nothing_behind(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[weakref.ref[State]] = []
    plain = State.__init__

    def noted(self: State, *given: Any, **more: Any) -> None:
        states.append(weakref.ref(self))
        plain(self, *given, **more)

    monkeypatch.setattr(State, "__init__", noted)
    shared = decoder.with_drafter("kangaroo", threshold=0.02)
    alone = answers(shared, 1)
    whole = shared.generate([PROMPTS[0]], max_tokens=40)[0]
    for pieces in range(4):
        stream = shared.stream(PROMPTS[0], max_tokens=40)
        read = [next(stream) for _ in range(pieces)]
        assert stream.completion is None
        assert stream.stats.emitted >= len(read)
        assert whole.text.startswith("".join(piece.text for piece in read))
        assert answers(shared, 1) == alone  # while the other one waits
        del stream
    gc.collect()
    assert len(states) >= 10
    assert not any(state() for state in states)


def texts_of(chat: Path) -> str:
    """What a process of its own writes."""
    return repr(answers(load(str(chat / "target"), adapter=chat / "adapter", dtype=torch.float32, threshold=0.02), 1))


def test_processes_with_one_model_and_cache(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path / "cache"))  # in which all of them note the same findings
    # Forks of a process that has had threads may wait for locks for ever.
    with multiprocessing.get_context("spawn").Pool(3, maxtasksperchild=1) as pool:
        texts = pool.map(texts_of, [chat] * 3, chunksize=1)
    assert {*texts, texts_of(chat)} == {texts[0]}
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_decoder_says_why_it_is_not_pickled(way: Callable[[Decoder], Any], decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="neither pickled nor copied: load it there"):
        way(decoder)


def test_samplings_are_keys_and_travel(decoder: Decoder) -> None:
    biased = Sampling(temperature=0.5, logit_bias={3: 1.0, 5: -1.0})
    assert {biased: 1}[pickle.loads(pickle.dumps(biased))] == 1
    assert len({Sampling(), Sampling(seed=1), biased, Sampling()}) == 3
