"""An engine answers requests as they come, from threads and from asyncio, and outlives whatever befalls one of them."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kangaroo
from chat_model import save_chat_model
from kangaroo import Completion, Decoder, Engine, Sampling, worker
from kangaroo.errors import CapacityError, ConfigError, DataError, EngineClosed, QueueFull
from kangaroo.load import Load
from kangaroo.scheduler import Step
from kangaroo.schedulers import Schedulers

HOT = Sampling(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return kangaroo.load(folder / "target", adapter=folder / "adapter", dtype="float64", threshold=0.02)


@pytest.fixture
def engine(decoder: Decoder) -> Iterator[Engine]:
    with decoder.engine(rows=3) as engine:
        yield engine


def facts(answer: Completion | None) -> tuple[object, ...]:
    """What neither company nor drafts may change."""
    assert answer is not None
    return answer.text, answer.tokens, answer.finish_reason, answer.stopped_by, answer.prompt_tokens, answer.logprobs


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("Where would", {"max_tokens": 20}),
    ("I need 3 tickets", {"sampling": HOT, "max_tokens": 30, "stop": ["e"]}),
    ("The", {"max_tokens": 5, "logprobs": 2}),
    ("A long way " * 20, {"sampling": Sampling(temperature=0.7, top_k=20, seed=1), "max_tokens": 12}),
    ("The", {"max_tokens": 12, "speculate": False}),
    (
        "I need",
        {"max_tokens": 9, "processor": lambda prompt, output, scores: scores.index_fill(0, torch.tensor(7), -9)},
    ),
    ("Where", {"max_tokens": 14, "min_tokens": 6, "ignore_eos": True}),
]


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> list[tuple[object, ...]]:
    answers = []
    for prompt, options in ASKED:
        own = {key: value for key, value in options.items() if key != "speculate"}
        answers.append(facts(decoder.plain().generate([prompt], **own)[0]))
    return answers


def test_every_request_gets_the_text_it_would_get_alone(engine: Engine, alone: list[tuple[object, ...]]) -> None:
    tickets = [engine.submit(prompt, **options) for prompt, options in ASKED]
    for ticket, wanted in zip(tickets, alone, strict=True):
        assert "".join(piece.text for piece in ticket) == wanted[0]
        assert facts(ticket.completion) == wanted
    assert tickets[4].speculation == "asked not to"
    assert tickets[4].stats.drafted == 0 < tickets[0].stats.drafted
    status = engine.status()
    assert status.running == status.waiting == 0
    assert (status.requests, status.rows) == (len(ASKED), 3)
    assert status.emitted == sum(ticket.stats.emitted for ticket in tickets)
    assert status.accepted == sum(status.accepted_per_position) == sum(ticket.stats.accepted for ticket in tickets)
    assert status.rounds == sum(status.stops.values()) == sum(ticket.stats.rounds for ticket in tickets)
    assert status.stops["off"] >= tickets[4].stats.rounds
    assert status.draft_seconds > 0 < status.verify_seconds


def test_threads_and_event_loops_share_an_engine(engine: Engine, alone: list[tuple[object, ...]]) -> None:
    found: dict[int, tuple[object, ...]] = {}

    def ask(number: int) -> None:
        prompt, options = ASKED[number]
        ticket = engine.submit(prompt, **options)
        list(ticket)
        found[number] = facts(ticket.completion)

    async def ask_all() -> list[str]:
        async def text(prompt: str, options: dict[str, Any]) -> str:
            return "".join([piece.text async for piece in engine.stream(prompt, **options)])

        return list(await asyncio.gather(*(text(*asked) for asked in ASKED)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(ASKED))]
    for thread in threads:
        thread.start()
    texts = asyncio.run(ask_all())
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(ASKED))] == alone
    assert texts == [wanted[0] for wanted in alone]


def test_generate_takes_what_the_decoders_does(engine: Engine, decoder: Decoder) -> None:
    options: dict[str, Any] = {"sampling": HOT, "n": 3, "max_tokens": 9}
    wanted = decoder.generate(["The", "Where"], **options)
    assert [facts(a) for a in engine.generate(["The", "Where"], **options)] == [facts(a) for a in wanted]


def test_answers_may_wait_for_rows(decoder: Decoder) -> None:
    prompts = [prompt for prompt, _ in ASKED]
    together = decoder.generate(prompts, sampling=HOT, n=2, max_tokens=9)
    in_turn = decoder.generate(prompts, sampling=HOT, n=2, max_tokens=9, rows=3)
    assert [facts(a) for a in in_turn] == [facts(a) for a in together]
    assert [a.stats.drafts for a in in_turn] == [a.stats.drafts for a in together]
    with pytest.raises(ConfigError, match="rows"):
        decoder.generate(prompts, rows=0)


def test_in_float32_no_bit_depends_on_company(folder: Path) -> None:
    decoder = kangaroo.load(folder / "target", adapter=folder / "adapter", dtype="float32", threshold=0.02)
    options: dict[str, Any] = {"max_tokens": 16, "logprobs": kangaroo.Logprobs(top=3, raw=True)}
    prompts = [prompt for prompt, _ in ASKED]
    wanted = [facts(decoder.plain().generate([prompt], **options)[0]) for prompt in dict.fromkeys(prompts)]
    with decoder.engine(rows=4) as engine:
        tickets = [engine.submit(prompt, **options) for prompt in dict.fromkeys(prompts) for _ in range(2)]
        for ticket in tickets:
            list(ticket)
    if decoder.target.exactness.level == "bitwise":
        assert [facts(ticket.completion) for ticket in tickets[::2]] == wanted
        assert [facts(ticket.completion) for ticket in tickets[1::2]] == wanted


def test_without_a_drafter_tickets_say_so(decoder: Decoder) -> None:
    with decoder.plain().engine() as engine:
        ticket = engine.submit("The", max_tokens=3)
        list(ticket)
        assert ticket.speculation == "no drafter"


def test_requests_choose_their_drafters_and_share_rows(
    decoder: Decoder, alone: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Load, "drafts", lambda self, rows: True)  # whether it pays or not
    names = ["kangaroo", "prompt-lookup", "early-exit"]
    most, busiest = 0, list[set[str]]()
    step = Schedulers.step

    def watched(self: Schedulers) -> Step:
        nonlocal most
        done = step(self)
        most = max(most, self.running)
        busiest.append({name for name, one in self._made.items() if one._live is not None})
        return done

    monkeypatch.setattr(Schedulers, "step", watched)
    with decoder.engine(rows=4, also=names[1:]) as engine:
        assert list(engine.drafters) == names
        assert engine.drafters["kangaroo"] == decoder.drafter == "kangaroo, threshold=0.02"
        tickets = [
            (name, number, engine.submit(prompt, drafter=name, **options))
            for number, (prompt, options) in enumerate(ASKED)
            for name in names
        ]
        for name, number, ticket in tickets:
            for _ in ticket:
                pass
            assert facts(ticket.completion) == alone[number], name
            assert ticket.drafter == name
        drafted = {name: sum(t.stats.drafted for own, _, t in tickets if own == name) for name in names}
        assert len(set(drafted.values())) == 3, "each drafts in its own way"
        assert all(drafted.values())
        few = engine.submit("Where would", drafter="kangaroo", max_draft=1, max_tokens=20)
        ours = engine.submit("Where would", max_tokens=5)
        assert list(ours)
        assert ours.drafter == "kangaroo"
        assert list(few)
        assert max(few.stats.drafts) == 1
        assert facts(few.completion) == alone[0]
        for wrong in ("medusa", "", ["kangaroo"]):
            with pytest.raises(ConfigError, match="drafter must be one of kangaroo, prompt-lookup, early-exit, got"):
                engine.submit("x", drafter=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="max_draft must be at least 1"):
            engine.submit("x", max_draft=0)
    assert most == 4, "all rows are used, and no more than there are"
    assert any(len(names) == 3 for names in busiest), "all at once"
    assert all(names == {"kangaroo"} for names in busiest[-2:]), "and nothing is held for nobody"


def test_drafters_that_cannot_share_an_engine_are_refused(decoder: Decoder, folder: Path) -> None:
    with pytest.raises(ConfigError, match="two drafters called kangaroo"):
        decoder.engine(also=["kangaroo"])
    other = kangaroo.load(folder / "target", drafter="prompt-lookup")
    with pytest.raises(ConfigError, match="another target"):
        Engine(decoder, also=[other])


def endless(engine: Engine, **options: Any) -> kangaroo.Ticket:
    """A request that runs until it is broken off, for all that a test can see."""
    return engine.submit("The", ignore_eos=True, max_tokens=100, processor=slow, **options)


def slow(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
    time.sleep(0.01)
    return scores


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def test_a_cancelled_request_frees_its_row_and_ends(engine: Engine) -> None:
    tickets = [endless(engine) for _ in range(5)]
    next(tickets[0])
    assert tickets[4].queued_seconds > 0
    assert tickets[4].first_token_seconds is None
    for ticket in tickets:
        ticket.cancel()
        assert list(ticket) == []
        assert ticket.completion is None
    wait_until(lambda: engine.status().running == engine.status().waiting == 0)
    assert engine.submit("The", max_tokens=1).queued_seconds >= 0


def test_a_ticket_that_nobody_holds_is_cancelled(engine: Engine) -> None:
    ticket = endless(engine)
    next(ticket)
    del ticket
    gc.collect()
    wait_until(lambda: engine.status().running == 0)


def test_leaving_a_stream_early_cancels_it(engine: Engine) -> None:
    async def first() -> str:
        stream = engine.stream("The", max_tokens=100, ignore_eos=True, processor=slow)
        async for piece in stream:
            await stream.aclose()  # type: ignore[attr-defined]
            return piece.text
        raise AssertionError

    asyncio.run(first())
    wait_until(lambda: engine.status().running == 0)


def test_an_event_loop_that_ends_first_leaves_the_engine_alone(engine: Engine) -> None:
    tickets = []

    async def read() -> None:
        tickets.append(endless(engine))
        async with asyncio.timeout(0.05):
            async for _ in tickets[0]:
                pass

    with pytest.raises(TimeoutError):
        asyncio.run(read())
    assert next(tickets[0]).finish_reason is None
    tickets[0].cancel()
    assert len(engine.generate(["The"], max_tokens=3)) == 1


def test_an_error_of_one_request_is_its_own(engine: Engine, alone: list[tuple[object, ...]]) -> None:
    def fails(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
        if len(output) > 3:
            raise ZeroDivisionError("on purpose")
        return scores

    def bars(prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
        return scores - float("inf") if len(output) > 3 else scores

    good = engine.submit(ASKED[0][0], **ASKED[0][1])
    bad = [engine.submit("The", processor=fails), engine.submit("The", processor=bars)]
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        list(bad[0])
    with pytest.raises(ConfigError, match="forbids every token"):
        list(bad[1])
    list(good)
    assert facts(good.completion) == alone[0]
    assert facts(engine.generate([ASKED[0][0]], **ASKED[0][1])[0]) == alone[0]


def test_an_error_of_nobodys_ends_what_runs_and_the_engine_lives_on(
    decoder: Decoder, alone: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with decoder.engine(rows=2) as engine:
        first = endless(engine)
        next(first)
        with monkeypatch.context() as patch:

            def broken(*_: object) -> Tensor:
                raise RuntimeError("out of luck")

            patch.setattr(decoder.target, "logits", broken)
            with pytest.raises(RuntimeError, match="out of luck"):
                list(first)
        assert facts(engine.generate([ASKED[0][0]], **ASKED[0][1])[0]) == alone[0]


def test_what_cannot_be_is_refused_at_once(engine: Engine, decoder: Decoder) -> None:
    for options, kind in (
        ({"max_tokens": 0}, ConfigError),
        ({"stop": [""]}, ConfigError),
        ({"speculate": "no"}, ConfigError),
        ({"prompt": []}, DataError),
    ):
        with pytest.raises(kind):
            engine.submit(**{"prompt": "The", **options})  # type: ignore[arg-type]
    with decoder.engine(capacity=20) as narrow, pytest.raises(CapacityError, match="capacity"):
        narrow.submit("The", max_tokens=40)
    for settings in ({"rows": 0}, {"queue": -1}, {"capacity": 1}, {"capacity": 10**6}, {"prefix_tokens": -1}):
        with pytest.raises(ConfigError):
            decoder.engine(**settings)


def test_a_full_queue_says_when_to_come_again(decoder: Decoder) -> None:
    with decoder.engine(rows=1, queue=2) as engine:
        tickets = [endless(engine)]
        next(tickets[0])
        tickets += [endless(engine) for _ in range(2)]
        with pytest.raises(QueueFull) as caught:
            endless(engine)
        assert 1 <= caught.value.retry_after <= 60
        assert engine.status().waiting == 2
        for ticket in tickets:
            ticket.cancel()


def test_closing_lets_requests_finish_or_breaks_them_off(decoder: Decoder) -> None:
    engine = decoder.engine(rows=2)
    ticket = engine.submit("The", max_tokens=9, ignore_eos=True)
    engine.close()
    assert len(list(ticket)) == 9
    hurried = decoder.engine(rows=1)
    tickets = [endless(hurried) for _ in range(2)]
    next(tickets[0])
    hurried.close(drain=0.05)
    hurried.close()
    for ticket in tickets:
        with pytest.raises(EngineClosed):
            list(ticket)
    with pytest.raises(EngineClosed):
        hurried.submit("The")
    assert not [thread for thread in threading.enumerate() if thread.name == "kangaroo-engine"]


def test_an_engine_that_nobody_holds_leaves_no_thread(decoder: Decoder) -> None:
    engine = decoder.engine(rows=1)
    engine.generate(["The"], max_tokens=3)
    del engine
    gc.collect()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "kangaroo-engine"])


def test_holes_in_the_heap_are_given_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    trims = []
    monkeypatch.setattr(worker, "trim_heap", lambda: trims.append(threading.current_thread().name))
    engine.generate(["The"], max_tokens=3)
    assert not trims, "not in every round"
    monkeypatch.setattr(worker, "TRIM_SECONDS", 0.0)
    engine.generate(["The"], max_tokens=3)
    assert set(trims) == {"kangaroo-engine"}
