"""Rows that come, go and move while others are under way: every request gets its own text, and no bit is different."""

import random
from collections.abc import Sequence

import pytest
import torch

from kangaroo import Request, Sampling
from kangaroo.completion import Transcript
from kangaroo.load import Load
from kangaroo.model import Target
from kangaroo.scheduler import Limits, Scheduler, Task, arrangement
from oracle import EVERYTHING, GREEDY, GREEDY_PENALISED, oracle
from runs import COPYING, DRAFTERS, PROMPTS
from tiny import VOCAB, target

HOT = Sampling(temperature=1.0, seed=3)
SAMPLINGS = (GREEDY, GREEDY_PENALISED, EVERYTHING, HOT)


class Mute:
    """Stands in for a text where only tokens count."""

    stopped, stopped_by = False, None

    def push(self, token: int) -> str:
        """No text."""
        return ""

    flush = staticmethod(str)


class Moody(Load):
    """Drafts now and then."""

    def __init__(self, random_: random.Random):
        super().__init__()
        self._random = random_

    def drafts(self, rows: int) -> bool:
        """More often than not."""
        return self._random.random() < 0.8


class Hushed(Load):
    """Drafts nothing in the first rounds of a task, nor before."""

    def __init__(self, first: Task):
        super().__init__()
        self._first = first

    def drafts(self, rows: int) -> bool:
        """Once there have been five."""
        return self._first.answer.stats.rounds >= 5


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
    request, completion = one.request, one.answer.completion  # type: ignore[attr-defined]
    wanted = oracle(model.model, request.prompt, request.sampling, request.max_tokens, eos)
    assert completion.tokens == wanted
    assert sum(one.answer.stats.lengths) == len(wanted)


@pytest.mark.parametrize("name", DRAFTERS)
def test_whoever_comes_and_goes_every_request_gets_its_own_text(name: str) -> None:
    model, random_ = target("llama"), random.Random(name)
    eos = (oracle(model.model, PROMPTS[0], GREEDY, 9)[8],)
    scheduler = Scheduler(model, lambda: DRAFTERS[name](model), eos, Limits(4))
    scheduler._load = Moody(random_)
    tasks = random_tasks(random_, 11, eos)
    given_up = tasks[::5]
    play(scheduler, tasks, random_, given_up)
    finished = [one for one in tasks if one.answer.ended]
    assert len(finished) >= len(tasks) - len(given_up)
    for one in finished:
        check(model, one, eos)
    drafted = sum(one.answer.stats.drafted for one in finished)
    accepted = sum(one.answer.stats.accepted for one in finished)
    if name not in {"none", *COPYING}:
        assert 0 < accepted < drafted
    assert scheduler.running == scheduler.waiting == 0


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3", "mixtral"])
def test_so_it_is_in_other_families(family: str) -> None:
    model, random_ = target(family), random.Random(family)
    scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo"](model), (), Limits(3))
    tasks = random_tasks(random_, 6)
    play(scheduler, tasks, random_)
    for one in tasks:
        check(model, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral", "phi", "gpt_oss"])
def test_in_long_runs_as_well(family: str, name: str) -> None:
    model, random_ = target(family), random.Random(family + name)
    for rows, prefix_tokens in ((6, 0), (3, 256)):
        scheduler = Scheduler(model, lambda: DRAFTERS[name](model), (), Limits(rows, None, prefix_tokens))
        scheduler._load = Moody(random_)
        tasks = random_tasks(random_, 30)
        for one in tasks[::3]:
            one.request.prompt[:0] = SYSTEM[: 128 - 20 - len(one.request.prompt)]  # type: ignore[index]
        play(scheduler, tasks, random_, tasks[::7])
        for one in tasks:
            if one.answer.ended:
                check(model, one)


SYSTEM = [(7 * i * i + 3) % VOCAB for i in range(70)]


@pytest.mark.parametrize(
    "name", ["kangaroo", "kangaroo-tree-of-few", "kangaroo+lookup", "medusa", "draft-model", "llma"]
)
def test_a_beginning_that_prompts_share_is_run_once(name: str) -> None:
    model, random_ = target("llama"), random.Random(name)
    prompts = [[*SYSTEM, *(random_.randrange(VOCAB) for _ in range(n))] for n in (0, 1, 20, 40, 3, 8)]
    requests = [Request(prompt, random_.choice(SAMPLINGS), 9) for prompt in prompts]
    drafted = []
    for prefix_tokens in (64, 0):
        scheduler = Scheduler(model, lambda: DRAFTERS[name](model), (), Limits(3, None, prefix_tokens))
        tasks = [task(request) for request in requests]
        play(scheduler, tasks, random.Random(1))
        for done in tasks:
            check(model, done)
        assert sum(done.cached for done in tasks) == prefix_tokens * (len(tasks) - 1)
        drafted.append([done.answer.stats.drafts for done in tasks])
    # A drafter makes of a beginning that it is shown what it makes of one that is run.
    assert drafted[0] == drafted[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_what_is_recalled_has_the_bits_that_running_it_would_leave(family: str) -> None:
    model = target(family)
    prompt = [(5 * i * i + i) % VOCAB for i in range(97)]
    found = []
    for earlier in ([], [*prompt[:64], 1, 2], [*prompt[:80], 3]):
        scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo"](model), (), Limits(2, None, 256))
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
    scheduler = Scheduler(model, lambda: DRAFTERS["none"](model), (), Limits(1, None, 130))
    prompts = [[first, *SYSTEM[:65]] for first in (1, 2, 3)]
    cached = []
    for number in (0, 1, 0, 2, 0, 1, 2):
        one = task(Request(prompts[number], GREEDY, 2))
        play(scheduler, [one], random.Random(0))
        cached.append(one.cached > 0)
        assert scheduler._prefixes.tokens <= 128
    assert cached == [False, False, True, False, True, False, False]


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_long_prompt_is_read_in_pieces_between_rounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kangaroo.scheduler.PREFILL_CHUNK", 16)
    model = target("llama")
    scheduler = Scheduler(model, lambda: DRAFTERS[name](model), (), Limits(3))
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


def test_rows_that_memory_has_no_room_for_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = target("llama")
    scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo"](model), (), Limits(2))
    first, second = task(Request(PROMPTS[0], GREEDY, 6)), task(Request(PROMPTS[2], GREEDY, 60))
    scheduler.submit(first)
    scheduler.step()
    monkeypatch.setattr("kangaroo.cache.available_bytes", lambda device: 100)
    scheduler.submit(second)
    while not first.ended:
        scheduler.step()
        assert second.seated is None
    monkeypatch.undo()
    play(scheduler, [], random.Random(0))
    for one in (first, second):
        check(model, one)


def test_an_error_in_a_prompt_is_that_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = target("llama")
    scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo"](model), (), Limits(3))
    first, second = task(Request(PROMPTS[0], GREEDY, 12)), task(Request(PROMPTS[2], GREEDY, 6))
    scheduler.submit(first)
    scheduler.step()
    scheduler.submit(second)
    with monkeypatch.context() as patch:

        def fails(*_: object) -> None:
            raise MemoryError

        patch.setattr("kangaroo.scheduler.prefill_chunk", fails)
        with pytest.raises(MemoryError):
            scheduler.step()
    assert scheduler.fail() == [second]
    play(scheduler, [], random.Random(0))
    check(model, first)


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


@pytest.mark.parametrize("name", ["kangaroo", "kangaroo-tree", "kangaroo+lookup"])
def test_a_row_that_company_has_left_drafts_as_it_would_have_alone(name: str) -> None:
    """While nothing is drafted, tokens wait for the adapter, others' beside those of a row that came later."""
    model, drafts = target("llama"), []
    for company in (True, False):
        ours, theirs = task(Request(PROMPTS[0][:2], GREEDY, 30)), task(Request(PROMPTS[1], GREEDY, 12))
        scheduler = Scheduler(model, lambda: DRAFTERS[name](model), (), Limits(2))
        scheduler._load = Hushed(ours)
        if company:
            scheduler.submit(theirs)
            for _ in range(9):
                scheduler.step()
        scheduler.submit(ours)
        while scheduler.busy:
            scheduler.step()
        assert theirs.ended is company
        check(model, ours)
        drafts.append(ours.answer.stats.drafts)
    assert sum(drafts[0]) > 0
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize(("price", "drafts"), [(0.0, True), (50.0, False)])
def test_auto_stopping_goes_by_what_rounds_have_cost(
    price: float, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Load, "price", lambda self, rows: price)
    model = target("llama")
    scheduler = Scheduler(model, lambda: DRAFTERS["kangaroo-auto"](model), (), Limits(2), weigh=True)
    tasks = [task(Request(prompt, GREEDY, 5)) for prompt in PROMPTS]
    play(scheduler, tasks, random.Random(0))
    for one in tasks:
        check(model, one)
    assert (sum(one.answer.stats.drafted for one in tasks) > 0) is drafts


@pytest.mark.parametrize("name", ["kangaroo", "kangaroo-tree", "kangaroo+lookup", "medusa-tree", "rest", "draft-model"])
def test_nothing_is_drafted_where_nothing_is_wanted(name: str) -> None:
    model = target("llama")
    scheduler = Scheduler(model, lambda: DRAFTERS[name](model), (), Limits(2))
    unwanted, wanted = Request(PROMPTS[0], GREEDY, 40, speculate=False), Request(PROMPTS[2], GREEDY, 9)
    tasks = [task(unwanted), task(wanted)]
    play(scheduler, tasks, random.Random(0))
    for one in tasks:
        check(model, one)
    assert tasks[0].answer.stats.drafts == [0] * 40
    assert sum(tasks[1].answer.stats.drafts) > 0
