"""The compression rate simulated in training is the one that decoding then has."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lesson import Lesson, build

from kangaroo.decode import decode, start
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.chain import ChainConfig, Kangaroo
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from kangaroo.training.evaluation import chain_rounds

MakeLesson = Callable[..., Lesson]


def test_simulated_rounds_are_those_of_decoding(make_lesson: MakeLesson) -> None:
    """Same rounds, not only the same rate: on answers cut by length and by an end token, with some drafts refused."""
    run = make_lesson()
    changes = {"evaluation__max_tokens": 30, "evaluation__prompts": 6}
    best = run.train(schedule__steps=12, **changes)
    objective, _ = build(run, **changes)
    settings, target = objective.recipe.evaluation, objective.target
    adapter = Adapter.load(best, target)
    objective.adapter = adapter
    simulated, _ = objective.held_out.simulate(objective)
    measured = []
    eos = (int(target.model.config.eos_token_id),)
    written = objective.held_out.written
    for index, answer in enumerate(objective.held_out.answers):
        tokens, _ = written.corpus.document(index)
        prompt = tokens[: len(tokens) - len(answer)].tolist()
        request = Request(prompt, Sampling(), settings.max_tokens)
        drafter = Kangaroo(target, adapter, 2, ChainConfig(max_draft=settings.max_draft, threshold=settings.threshold))
        state = start(target, drafter, [request], eos=eos)
        measured.append([len(done.emitted[0]) for done in decode(target, drafter, state)])
    assert [sum(rounds) for rounds in measured] == [len(answer) for answer in objective.held_out.answers]
    assert simulated == measured
    lengths = [n for rounds in measured for n in rounds]
    assert 1.2 < sum(lengths) / len(lengths) < 6
    assert {1, 2} < set(lengths)


@given(st.data())
def test_simulation_is_the_round_by_round_definition(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    correct = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    confident = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    max_draft, room = data.draw(st.integers(1, 5)), count + data.draw(st.integers(0, 3))
    left, position = chain_rounds(correct, confident, max_draft=max_draft, room=room), 0
    for emitted in left:
        # Draft as decoding does: on while sure, within the room, right or wrong.
        drafted = 0
        while drafted < max_draft and drafted + position + 1 < room and position + drafted < count:
            drafted += 1
            if not confident[position + drafted - 1]:
                break
        accepted = 0
        while accepted < drafted and correct[position + accepted]:
            accepted += 1
        assert emitted == min(accepted + 1, count - position)
        position += emitted
    assert position == count


@pytest.mark.parametrize(
    ("correct", "confident", "room", "rounds"),
    [
        ("1111111", "1111111", 7, [4, 3]),  # three drafts and the target's own; then the room is for two and one
        ("111", "111", 9, [3]),  # the third draft is the end token: nothing follows it
        ("1111", "0111", 4, [2, 2]),  # the unsure token is drafted, and accepted
        ("0000", "1111", 4, [1, 1, 1, 1]),
    ],
)
def test_simulation_by_hand(correct: str, confident: str, room: int, rounds: list[int]) -> None:
    flags = [[c == "1" for c in text] for text in (correct, confident)]
    assert chain_rounds(*flags, max_draft=3, room=room) == rounds
