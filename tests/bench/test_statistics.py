"""Figures against values worked out by hand, and intervals against worlds whose truth is known."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import make_run, record, turn

import kangaroo
from chat_model import save_chat_model
from kangaroo.bench.cost import Costs, MethodCosts, method_costs
from kangaroo.bench.records import BASELINE, Difference, Record
from kangaroo.bench.report.bound import bounds
from kangaroo.bench.report.grid import OVERALL, arrange
from kangaroo.bench.report.statistics import Summary, interval, relative_speeds, resample_totals, summarise
from kangaroo.errors import DataError

TEXT = list(range(8))


def summary(records: list[Record], method: str = "ours", task: str = OVERALL) -> Summary:
    return summarise(arrange(records), resamples=200)[method][task]


def two_questions() -> list[Record]:
    """Baseline: 8 tokens in 4 s and 8 in 8 s; ours: the same in 2 s and 2 s, with rounds of 3, 3, 2 and 1, 5, 2."""
    return [
        record(1, BASELINE, turn(TEXT, seconds=(1.0, 0.0, 2.0, 1.0))),
        record(1, "ours", turn(TEXT, [3, 3, 2], [4, 2, 1], (1.0, 0.25, 0.5, 0.25), peak_bytes=7)),
        record(2, BASELINE, turn(TEXT, seconds=(1.0, 0.0, 6.0, 1.0)), task="rag"),
        record(2, "ours", turn(TEXT, [1, 5, 2], [0, 4, 3], (1.0, 0.25, 0.5, 0.25), peak_bytes=9), task="rag"),
    ]


def test_figures_of_two_questions_worked_out_by_hand() -> None:
    found = summary(two_questions())
    assert found.speedup.value == pytest.approx(12 / 4)
    assert found.decode_speedup is not None
    assert found.decode_speedup.value == pytest.approx(10 / 2)
    assert found.tokens_per_second == 16 / 4
    assert found.compression_rate == 16 / 6
    assert found.acceptance == [5 / 6, 3 / 6, 1 / 6, 1 / 6]
    assert found.compression_rate == pytest.approx(1 + sum(found.acceptance))
    assert found.drafted_per_round == 14 / 6
    assert found.accepted_share == 10 / 14
    assert found.stops == Counter(nothing=1, confidence=3, length=2)
    assert found.seconds == {"prefill": 2.0, "draft": 0.5, "verify": 1.0, "rest": 0.5}
    assert (found.questions, found.answers, found.tokens, found.rounds, found.peak_bytes) == (2, 2, 16, 6, 9)
    assert found.identical == 2


def test_a_task_has_its_own_figures_and_the_baseline_is_once_as_fast_as_itself() -> None:
    assert summary(two_questions(), task="qa").speedup.value == pytest.approx(2)
    assert summary(two_questions(), task="rag").speedup.value == pytest.approx(4)
    plain = summary(two_questions(), BASELINE)
    assert (plain.speedup.value, plain.speedup.low, plain.speedup.high) == (1, 1, 1)
    assert plain.compression_rate == 1
    assert plain.accepted_share is None


def test_methods_can_be_compared_with_each_other_in_pairs() -> None:
    times = {BASELINE: (4.0, 9.0), "ours": (2.0, 3.0), "theirs": (1.0, 1.5)}
    records = [
        record(place + 1, method, turn(TEXT, seconds=(0.0, 0.0, seconds[place], 0.0)))
        for method, seconds in times.items()
        for place in range(2)
    ]
    grid = arrange(records)
    assert relative_speeds(grid, BASELINE)["ours"][OVERALL] == summarise(grid)["ours"][OVERALL].speedup
    # Twice as fast on either question: what the questions have in common is not uncertain.
    found = relative_speeds(grid, "ours")["theirs"][OVERALL]
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert relative_speeds(grid, "ours")[BASELINE][OVERALL].value == pytest.approx(5 / 13)


def test_speed_is_time_per_token_where_answers_differ_in_length() -> None:
    records = [
        record(1, BASELINE, turn(TEXT, seconds=(0.0, 0.0, 8.0, 0.0))),
        record(1, "ours", turn(TEXT[:4], [2, 2], [1, 1], (0.0, 0.0, 2.0, 0.0))),
    ]
    assert summary(records).speedup.value == pytest.approx((8 / 8) / (2 / 4))


def test_one_question_has_no_interval_and_two_have() -> None:
    alone = summary(two_questions(), task="qa").speedup
    assert (alone.low, alone.high) == (None, None)
    both = summary(two_questions()).speedup
    assert both.low == pytest.approx(2)
    assert both.high == pytest.approx(4)


def test_repeats_of_a_question_are_not_more_questions() -> None:
    twice = [entry.model_copy(update={"repeat": repeat}) for entry in two_questions() for repeat in (0, 1)]
    once, again = summary(two_questions()), summary(twice)
    assert (again.questions, again.answers, again.tokens) == (2, 4, 32)
    assert again.speedup == once.speedup


def test_the_same_seed_gives_the_same_interval() -> None:
    grid = arrange(make_run({"ours": 0.7}))
    first, same, other = (summarise(grid, resamples=300, seed=seed)["ours"]["qa"].speedup for seed in (1, 1, 2))
    assert first == same
    assert first.value == other.value
    assert (first.low, first.high) != (other.low, other.high)


def test_resampled_totals_are_totals_of_whole_questions() -> None:
    values = np.array([[1.0, 10.0], [100.0, 1000.0], [10000.0, 100000.0]])
    totals = resample_totals(values, resamples=500, seed=0)
    assert totals.shape == (500, 2)
    assert np.array_equal(totals[:, 1], 10 * totals[:, 0])
    digits = np.stack([totals[:, 0] // 100**place % 100 for place in range(3)], 1)
    assert set(digits.sum(1)) == {3}
    assert digits.mean(0) == pytest.approx(1, abs=0.15)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, worlds, covered, widths = np.random.default_rng(5), 300, 0, []
    for world in range(worlds):
        # Per question: tokens, baseline seconds, method seconds; the true ratio of totals is 2.
        tokens = rng.integers(20, 200, 40)
        values = np.stack([tokens * rng.lognormal(0, 0.3, 40), tokens * rng.lognormal(0, 0.3, 40) / 2], 1)
        draws = resample_totals(values, resamples=400, seed=world)
        low, high = interval(draws[:, 0] / draws[:, 1])
        covered += low <= 2 <= high
        widths.append(high - low)
    assert 0.90 <= covered / worlds <= 0.98
    assert 0.2 < np.mean(widths) < 0.8


def test_the_first_difference_is_found_and_only_a_recorded_tie_explains_it() -> None:
    tied = Difference(position=2, gap=0.01, tie=True)
    records = [
        record(1, BASELINE, turn([5, 6, 7]), turn([1, 2, 3])),
        record(1, "ours", turn([5, 6, 7]), turn([1, 2, 9], difference=tied)),
        record(2, BASELINE, turn([5, 6, 7]), turn([1])),
        record(2, "ours", turn([5, 6]), turn([2])),
    ]
    found = summary(records)
    assert (found.answers, found.identical, found.ties) == (2, 0, 1)
    first, second = found.differences
    assert (first.question, first.turn, first.position, first.gap, first.tie) == (1, 1, 2, 0.01, True)
    assert (second.question, second.turn, second.position, second.gap, second.tie) == (2, 0, 2, None, False)


def test_a_method_that_does_not_tell_its_rounds_or_its_prefill_has_no_figures_of_them() -> None:
    silent = turn(TEXT, [], seconds=(0.0, 0.0, 0.0, 2.0))
    found = summary([record(1, BASELINE, turn(TEXT)), record(1, "peer", silent)], "peer")
    assert found.speedup.value == pytest.approx(1.1 / 2)
    assert found.decode_speedup is None
    assert found.compression_rate is None
    assert found.drafted_per_round is None
    assert found.acceptance == []


def test_tasks_are_in_the_papers_order() -> None:
    records = make_run({}, tasks=("poems", "mt_bench", "qa"), questions=1)
    assert list(arrange(records).tasks) == ["qa", "mt_bench", "poems"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: [], "there are no records"),
        (lambda all_: all_[1:], "by none to question 1 in repeat 0"),
        (lambda all_: all_[:3], "by ours to question 2 in repeat 0"),
        (lambda all_: [*all_, all_[0].model_copy(update={"repeat": 1})], "3 answers are missing"),
        (lambda all_: [*all_, all_[0].model_copy(update={"task": "rag", "method": "x"})], "belongs to two tasks"),
        (lambda all_: [entry.model_copy(update={"task": "overall"}) for entry in all_], "no task may be called"),
        (lambda all_: [*all_[:3], record(2, "ours", turn(TEXT), turn(TEXT), task="rag")], "ours has 2 turns"),
        (lambda all_: [record(1, BASELINE, turn([]))], "measures nothing"),
        (lambda all_: [record(1, BASELINE, turn(TEXT, seconds=(0.0, 0.0, 0.0, 0.0)))], "measures nothing"),
        (lambda all_: [record(1, BASELINE, turn(TEXT, [3, 3]))], "cannot have emitted 8"),
        (lambda all_: [record(1, BASELINE, turn(TEXT, [8], [1, 2]))], "1 rounds, but 2 drafts"),
    ],
)
def test_records_that_are_incomplete_or_contradict_themselves_are_refused(change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        arrange(change(two_questions()))


def test_bounds_worked_out_by_hand() -> None:
    found = summary(two_questions())  # 6 rounds, 14 drafted, 16 emitted
    measured = Costs(full_step=1.0, shallow=0.1, adapter=0.05, head=0.05, verify={1: 0.9, 2: 1.0, 3: 1.1})
    got = bounds(found, MethodCosts(draft_share=0.25, measured=measured))
    assert got.weights == pytest.approx(16 / (6 + 0.25 * 14))
    # Rounds of 4, 2, 1, 0, 4 and 3 drafts; more nodes than were timed cost what the most timed ones did.
    seconds = (14 + 6) * 0.1 + 14 * 0.1 + (1.1 + 1.1 + 1.0 + 0.9 + 1.1 + 1.1)
    assert got.passes == pytest.approx(16 / seconds)
    assert bounds(found, MethodCosts(draft_share=0.0)).weights == found.compression_rate
    assert bounds(found, None).weights is None


def test_weights_that_a_draft_step_reads_are_counted(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path)  # width 32, 4 heads of 8, 2 of them keys and values, 48 inner, 300 tokens
    decoder = kangaroo.load(folder / "target", adapter=folder / "adapter", dtype=torch.float32)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    layer, adapter, head = attention + 3 * 32 * 48 + 2 * 32, attention + 2 * 32, 300 * 32
    costs = method_costs(decoder)
    assert costs is not None
    assert costs.draft_share == pytest.approx((layer + adapter + head) / (4 * layer + head))
    assert costs.measured is not None
    assert set(costs.measured.verify) == set(range(1, 8))
    assert method_costs(decoder.plain()) is None
    assert method_costs(decoder.with_drafter("prompt-lookup")) == MethodCosts(draft_share=0.0)
