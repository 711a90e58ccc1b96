"""Who is asked what, in which order, and what happens before the clock runs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import kangaroo
from chat_model import save_chat_model
from kangaroo.bench.asking import WARM_UP, Asker
from kangaroo.bench.questions import Question
from kangaroo.bench.recipe import BenchRecipe
from kangaroo.bench.records import BASELINE, Measured
from kangaroo.decoder import Decoder
from kangaroo.sampling import Sampling
from kangaroo.toml import parse_table

TOKENS = 40


class Scripted:
    """Notes what it is asked; always answers the same."""

    def __init__(self, name: str, calls: list[tuple[str, int, int, int]]):
        self._name, self._calls = name, calls

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int) -> list[Measured]:
        self._calls.append((self._name, len(prompts), max(map(len, prompts)), max_tokens))
        answer = Measured(
            tokens=[5] * max_tokens, finish_reason="length", prefill=1, draft=1, verify=1, rest=1, emitted=[]
        )
        return [answer for _ in prompts]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = save_chat_model(tmp_path_factory.mktemp("chat"))
    return kangaroo.load(folder / "target", drafter="none", dtype=torch.float64)


@pytest.fixture
def calls() -> list[tuple[str, int, int, int]]:
    return []


@pytest.fixture
def asker(decoder: Decoder, calls: list[tuple[str, int, int, int]], tmp_path: Path) -> Asker:
    recipe = parse_table(BenchRecipe, {"model": "x", "output": str(tmp_path), "max_tokens": TOKENS}, "test")
    return Asker(decoder, {name: Scripted(name, calls) for name in (BASELINE, "a", "b")}, recipe)


def question(number: int, *turns: str) -> Question:
    return Question(number, "task", "category", turns)


def timed(calls: list[tuple[str, int, int, int]]) -> list[str]:
    """Methods in the order of their timed answers: every second call, as each prompt's length is new."""
    return [name for name, *_ in calls[1::2]]


def test_the_method_that_goes_first_changes_and_records_keep_the_recipes_order(
    asker: Asker, calls: list[tuple[str, int, int, int]]
) -> None:
    for rotation, order in enumerate([["none", "a", "b"], ["a", "b", "none"], ["b", "none", "a"], ["none", "a", "b"]]):
        calls.clear()
        records = asker.ask([question(rotation, "Where? " * (rotation + 1))], 0, rotation)
        assert timed(calls) == order
        assert [record.method for record in records] == ["none", "a", "b"]


def test_every_method_warms_up_on_every_length_of_prompt_once(
    asker: Asker, calls: list[tuple[str, int, int, int]]
) -> None:
    asker.ask([question(1, "Where?")], 0, 0)
    for name in (BASELINE, "a", "b"):
        assert [limit for who, *_, limit in calls if who == name] == [TOKENS, TOKENS], "the first is a whole answer"
    calls.clear()
    asker.ask([question(2, "Where? Where? Where?")], 0, 0)
    assert [limit for *_, limit in calls] == [WARM_UP, TOKENS] * 3
    calls.clear()
    asker.ask([question(3, "Where?")], 1, 0)
    assert [limit for *_, limit in calls] == [TOKENS] * 3, "this length has been met"


def test_in_a_batch_only_questions_with_another_turn_go_on(
    asker: Asker, calls: list[tuple[str, int, int, int]]
) -> None:
    records = asker.ask([question(1, "Where?", "Why?"), question(2, "When?"), question(3, "Who?", "How?")], 0, 0)
    assert {(rows, limit) for _, rows, _, limit in calls} == {(3, TOKENS), (2, TOKENS), (2, WARM_UP)}
    assert [(record.question, len(record.turns)) for record in records if record.method == "a"] == [
        (1, 2),
        (2, 1),
        (3, 2),
    ]
