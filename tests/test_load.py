"""Whether drafts pay is found out at little cost, on machines and texts that are made up."""

import random
from collections.abc import Callable

import pytest

from kangaroo.load import SHORT, Load

STEPS = 3


class Machine:
    """Rounds on a machine where a drafted token costs `price` plain rounds, and is accepted with a probability."""

    def __init__(
        self,
        price: float,
        chance: float,
        seed: int = 0,
        noise: float = 0.1,
        steps: int = STEPS,
        busy: Callable[[int], float] = lambda number: 1.0,
    ):
        """`busy` says by how much longer a round takes, drafts or not, as others use the machine."""
        self.load, self.price, self.chance, self.noise, self.steps = Load(), price, chance, noise, steps
        self.busy, self.rounds = busy, 0
        self.behind, self.missed = 0.0, 0
        """What a round without drafts adds to the next with, whose drafter has to catch up; and how many there were."""
        self.drafted = 0
        self.tokens = self.seconds = 0.0
        """In those of plain rounds."""
        self._random = random.Random(seed)

    def run(self, rounds: int, rows: Callable[[int], int] = lambda number: 16) -> "Machine":
        """So many rounds, of as many rows as `rows` says."""
        for number in range(rounds):
            self._round(rows(number))
        return self

    def _round(self, rows: int) -> None:
        drafting = self.load.drafts(rows)
        most = self.load.most(rows)
        steps = (self.steps if most is None else min(most, self.steps)) * drafting
        lengths = [next((k for k in range(steps) if self._random.random() >= self.chance), steps) for _ in range(rows)]
        tokens = rows + sum(lengths)
        seconds = (1 + self.price * steps) * max(0.5, self._random.gauss(1, self.noise))
        seconds += self.behind * self.missed * drafting
        self.rounds, self.missed = self.rounds + 1, 0 if drafting else self.missed + 1
        self.load.learn(rows, drafting, tokens, steps, seconds * (1 + rows / 10) * self.busy(self.rounds))
        self.drafted += drafting
        self.tokens, self.seconds = self.tokens + tokens / rows, self.seconds + seconds

    @property
    def pace(self) -> float:
        """Against plain rounds alone."""
        return self.tokens / self.seconds


def best(price: float, chance: float, steps: int = STEPS) -> float:
    """Pace of the best there is: no drafts, short ones, or as long ones as there are."""
    return max(sum(chance**k for k in range(most + 1)) / (1 + price * most) for most in (0, min(SHORT, steps), steps))


def mean_pace(runs: list[Machine]) -> float:
    return sum(run.pace for run in runs) / len(runs)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("factor", [0.9, 1.1, 1.3])
def test_little_is_lost_against_the_best_choice(factor: float, rows: int) -> None:
    price, chance, steps = 0.3, factor * 1.3 - 1, 1  # a round with a draft of one token takes 1.3 plain ones
    for rounds, lost in ((128, 0.06), (1000, 0.03), (4000, 0.02)):
        runs = [Machine(price, chance, seed, steps=steps).run(rounds, lambda _: rows) for seed in range(8)]
        assert mean_pace(runs) > (1 - lost) * max(1.0, factor)
        if rounds == 1000:  # not by chance: what the seeds have in common
            assert sum(run.drafted for run in runs) / 8 == pytest.approx(920 if factor > 1 else 80, abs=200)


@pytest.mark.parametrize("rounds", [128, 1000, 5000])
@pytest.mark.parametrize("price", [0.3, 0.5, 2.0])
def test_looking_whether_drafts_pay_costs_little_where_they_do_not(price: float, rounds: int) -> None:
    runs = [Machine(price, 0.5 if price < 2 else 0.1, seed).run(rounds) for seed in range(40_000 // (2000 + rounds))]
    assert mean_pace(runs) > (0.97 if price < 2 or rounds > 128 else 0.85)
    assert all(not run.load.pays(16) for run in runs) or price == 0.3


@pytest.mark.parametrize("rows", [1, 16])
def test_where_they_pay_they_are_made_from_the_first_answer_on(rows: int) -> None:
    for seed in range(20):
        run = Machine(0.15, 0.6, seed).run(64, lambda _: rows)
        assert run.load.pays(rows)
        assert run.drafted > 48
        assert run.run(436, lambda _: rows).pace > 0.93 * best(0.15, 0.6)
        assert run.load.price(rows) == pytest.approx(0.15, abs=0.1)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    "busy",
    [
        lambda number: 1 + number // 50 % 2 / 2,
        lambda number: 1 + number // 200 % 2,
        lambda number: 1 + number % 90 / 300,
    ],
    ids=["for a moment", "for a while", "the longer the text"],
)
def test_rounds_that_take_longer_for_other_reasons_do_not_count_against_drafts(
    busy: Callable[[int], float], rows: int
) -> None:
    runs = [Machine(0.3, 0.56, seed, steps=1, busy=busy).run(1000, lambda _: rows) for seed in range(8)]
    assert sum(run.drafted for run in runs) / 8 > 900
    runs = [Machine(0.3, 0.1, seed, steps=1, busy=busy).run(1000, lambda _: rows) for seed in range(8)]
    assert sum(run.drafted for run in runs) / 8 < 250


def test_short_drafts_are_made_where_only_they_pay() -> None:
    for seed in range(10):
        run = Machine(0.3, 0.6, seed, steps=8)
        assert run.run(3000).load.most(16) == SHORT
        assert run.pace > 0.95 * best(0.3, 0.6, 8)
        assert Machine(0.1, 0.8, seed, steps=5).run(300).load.most(16) is None


def test_a_first_look_at_long_drafts_is_cheap() -> None:
    assert mean_pace([Machine(0.58, 0.4, seed, steps=6).run(130) for seed in range(20)]) > 0.97


def test_trials_become_rarer_the_longer_they_have_been_in_vain() -> None:
    run = Machine(0.5, 0.3)
    early, late = (run.run(rounds, lambda _: 1).drafted for rounds in (1500, 4500))
    assert early < late < 2 * early


def test_a_text_that_becomes_easier_or_harder_is_noticed() -> None:
    run = Machine(0.3, 0.1)
    run.behind = 0.02
    run.run(300)
    assert not run.load.pays(16)
    run.chance = 0.9
    before = run.drafted
    assert run.run(1000).load.pays(16)
    assert run.drafted - before > 300, "the first draft after a while tells little"
    run.chance = 0.1
    before = run.drafted
    assert not run.run(40).load.pays(16), "at once: what drafts bring is seen in every round"
    assert run.drafted - before < 20


def test_rows_that_come_and_go_are_no_hindrance() -> None:
    chance = random.Random(5)
    run = Machine(0.6, 0.5).run(400, lambda number: min(16, 1 + number // 2) - chance.choice((0, 0, 0, 1)) or 1)
    assert not run.load.pays(16)
    assert run.pace > 0.93


@pytest.mark.parametrize(("chance", "pays"), [(0.7, True), (0.2, False)])
def test_fewer_rows_speak_for_more(chance: float, pays: bool) -> None:
    run = Machine(1 / 3, chance, noise=0).run(2000, lambda _: 8)
    assert run.load.pays(8) is pays
    assert run.load.price(8) == pytest.approx(1 / 3)
    assert (run.drafted > 1850) if pays else (run.drafted < 100)
    assert run.load.pays(4), "with fewer rows they may pay"
    assert run.load.pays(9) is pays, "with more they hardly do"


def test_a_drafter_that_proposes_nothing_is_left_to_it() -> None:
    load, asked = Load(), 0
    for _ in range(1000):
        asked += load.drafts(4)
        load.learn(4, load.drafts(4), 4, 0, 0.1)
    assert asked > 990
    assert load.pays(4)
    assert load.price(4) is None
