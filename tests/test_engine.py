"""Requests that come and go while others run: each gets the text it would get alone, and costs nobody else anything."""

import asyncio
import gc
import random
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
from kangaroo import Completion, Decoder, Engine, Request, Sampling
from kangaroo.completion import Transcript
from kangaroo.errors import CapacityError, ConfigError, DataError, EngineClosed, QueueFull
from kangaroo.model import Target
from kangaroo.scheduler import Scheduler, Task, arrangement
from oracle import EVERYTHING, GREEDY, GREEDY_PENALISED, oracle
from runs import COPYING, DRAFTERS, PROMPTS
from tiny import VOCAB, target

SAMPLINGS = (GREEDY, GREEDY_PENALISED, EVERYTHING, Sampling(temperature=1.0, seed=3))
HOT = Sampling(temperature=1.0, seed=5)


class Mute:
    """Stands in for a text where only tokens count."""

    stopped, stopped_by = False, None

    def push(self, token: int) -> str:
        """No text."""
        return ""

    flush = staticmethod(str)


def task(request: Request, eos: Sequence[int] = ()) -> Task:
    return Task(request, Transcript(request, request.ends(eos), Mute(), 0))  # type: ignore[arg-type]


def random_tasks(random_: random.Random, count: int, eos: Sequence[int] = ()) -> list[Task]:
    """Prompts of all lengths, some of which begin alike, and every way of sampling."""
    tasks = []
    for _ in range(count):
        prompt = [*random_.choice(PROMPTS), *(random_.randrange(VOCAB) for _ in range(random_.choice((0, 0, 1, 30))))]
        tasks.append(task(Request(prompt, random_.choice(SAMPLINGS), random_.randint(1, 18)), eos))
    return tasks


def play(scheduler: Scheduler, tasks: Sequence[Task], random_: random.Random, cancelled: Sequence[Task] = ()) -> None:
    """Submit tasks as they come, a few steps apart; give some of them up along the way."""
    waiting = list(tasks)
    while waiting or scheduler.busy:
        for _ in range(random_.choice((0, 0, 1, 3))):
            if waiting:
                scheduler.submit(waiting.pop(0))
        scheduler.step()
        for one in cancelled:
            if not one.ended and one not in waiting and random_.random() < 0.2:
                scheduler.cancel(one)


def check(model: Target, one: Task, eos: Sequence[int] = ()) -> None:
    request, completion = one.request, one.transcript.completion
    assert completion is not None
    wanted = oracle(model.model, request.prompt, request.sampling, request.max_tokens, eos)
    assert completion.tokens == wanted
    assert sum(one.transcript.stats.lengths) == len(wanted)


# --- the scheduler


@pytest.mark.parametrize("name", DRAFTERS)
def test_whoever_comes_and_goes_every_request_gets_its_own_text(name: str) -> None:
    model, random_ = target("llama"), random.Random(name)
    eos = (oracle(model.model, PROMPTS[0], GREEDY, 9)[8],)
    scheduler = Scheduler(model, lambda: DRAFTERS[name](model), eos, rows=4)
    tasks = random_tasks(random_, 14, eos)
    given_up = tasks[::5]
    play(scheduler, tasks, random_, given_up)
    finished = [one for one in tasks if one.transcript.completion is not None]
    assert len(finished) >= len(tasks) - len(given_up)
    for one in finished:
        check(model, one, eos)
    drafted = sum(one.transcript.stats.drafted for one in finished)
    accepted = sum(one.transcript.stats.accepted for one in finished)
    if name not in {"none", *COPYING}:
        assert 0 < accepted < drafted
    assert scheduler.running == scheduler.waiting == 0


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3", "mixtral"])
def test_so_it_is_in_other_families(family: str) -> None:
    model, random_ = target(family), random.Random(family)
    scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo"](model), (), rows=3)
    tasks = random_tasks(random_, 6)
    play(scheduler, tasks, random_)
    for one in tasks:
        check(model, one)


SYSTEM = [(7 * i * i + 3) % VOCAB for i in range(70)]


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_beginning_that_prompts_share_is_run_once(name: str) -> None:
    model, random_ = target("llama"), random.Random(name)
    prompts = [[*SYSTEM, *(random_.randrange(VOCAB) for _ in range(n))] for n in (0, 1, 20, 40, 3, 8)]
    requests = [Request(prompt, random_.choice(SAMPLINGS), 9) for prompt in prompts]
    drafted = []
    for prefix_tokens in (64, 0):
        scheduler = Scheduler(model, lambda: DRAFTERS[name](model), (), rows=3, prefix_tokens=prefix_tokens)
        tasks = [task(request) for request in requests]
        play(scheduler, tasks, random.Random(1))
        for done in tasks:
            check(model, done)
        assert sum(done.cached for done in tasks) == prefix_tokens * (len(tasks) - 1)
        drafted.append([done.transcript.stats.drafts for done in tasks])
    # A drafter makes of a beginning that it is shown what it makes of one that is run.
    assert drafted[0] == drafted[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_what_is_recalled_has_the_bits_that_running_it_would_leave(family: str) -> None:
    model = target(family)
    prompt = [(5 * i * i + i) % VOCAB for i in range(97)]
    found = []
    for earlier in ([], [*prompt[:64], 1, 2], [*prompt[:80], 3]):
        scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo"](model), (), rows=2, prefix_tokens=256)
        if earlier:
            play(scheduler, [task(Request(earlier, HOT, 4))], random.Random(0))
        one = task(Request(prompt, GREEDY, 4))
        scheduler.submit(one)
        scheduler.step()
        assert one.cached == (64 if earlier else 0)
        assert scheduler._live is not None
        found.append(scheduler._live[1].cache.save(0, 0, len(prompt) - 1))
    for other in found[1:]:
        for kept, wanted in zip(other, found[0], strict=True):
            for got, side in zip(kept, wanted, strict=True):
                if model.exactness.level == "bitwise":
                    assert torch.equal(got[: model.num_layers], side[: model.num_layers])
                torch.testing.assert_close(got, side)


def test_the_beginnings_used_last_are_kept() -> None:
    model = target("llama")
    scheduler = Scheduler(model, lambda: DRAFTERS["none"](model), (), rows=1, prefix_tokens=130)
    prompts = [[first, *SYSTEM[:65]] for first in (1, 2, 3)]
    cached = []
    for number in (0, 1, 0, 2, 0, 1, 2):
        one = task(Request(prompts[number], GREEDY, 2))
        play(scheduler, [one], random.Random(0))
        cached.append(one.cached > 0)
        assert scheduler._prefixes.tokens <= 128
    assert cached == [False, False, True, False, True, False, False]


def test_a_long_prompt_is_read_in_pieces_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kangaroo.scheduler.PREFILL_CHUNK", 16)
    model = target("llama")
    scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo"](model), (), rows=3)
    first, long, short = (task(Request(prompt, GREEDY, 20)) for prompt in ([1, 2], list(range(90)), [3, 4]))
    scheduler.submit(first)
    scheduler.step()
    scheduler.submit(long)
    scheduler.submit(short)
    for _ in range(2):
        assert first in [one for one, _ in scheduler.step().pieces], "it keeps its pace"
    assert not short.unread, "a short prompt does not wait for the end of a long one"
    assert long.unread
    play(scheduler, [], random.Random(0))
    for one in (first, long, short):
        check(model, one)


@pytest.mark.parametrize(
    ("kept", "joining", "rows"),
    [
        ({0, 1, 2}, 0, [0, 1, 2]),
        ({0, 2}, 0, [0, 2]),
        ({1, 2, 3}, 0, [3, 1, 2]),
        ({3}, 2, [3, -1, -1]),
        ({0, 3}, 2, [0, -1, -1, 3]),
        (set(), 2, [-1, -1]),
        (set(), 0, []),
    ],
)
def test_few_rows_move(kept: set[int], joining: int, rows: list[int]) -> None:
    assert arrangement(kept, joining) == rows


# --- the engine


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
    assert status.stops["off"] == tickets[4].stats.rounds
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
