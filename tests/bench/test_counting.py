"""Both counts of the same answer files, by hand. The files here contain what the original's harness gets wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from kangaroo.bench.report.counting import AnswerRow, corrected, legacy, read_answers
from kangaroo.errors import DataError


def answer(number: int, turns: list[str], new: list[int], wall: list[float], lengths: list[int], **more: Any) -> dict:
    choice = {"index": 0, "turns": turns, "decoding_steps": [1], "new_tokens": new, "wall_time": wall}
    row = {"question_id": number, "category": "writing", "answer_id": "a", "model_id": "m", "tstamp": 1.0}
    return row | {"choices": [choice | {"accept_lengths": lengths}]} | more


def rows(*answers: dict) -> list[AnswerRow]:
    return [AnswerRow.model_validate(entry) for entry in answers]


def with_start(text: str) -> list[int]:
    """A tokenizer of words that puts a token in front, as Llama's does."""
    return [0, *range(1, 1 + len(text.split()))]


BASELINE = rows(
    answer(81, ["a b c d", "a b"], [5, 3], [2.0, 1.0], [1] * 8),  # the text lacks what ended each turn
    answer(82, ["a b c"], [4], [1.0], [1] * 4, category="qa"),
)
METHOD = rows(
    answer(81, ["a b c d", "a b"], [5, 3], [1.0, 0.5], [3, 2, 3]),
    answer(82, ["a b c"], [4], [0.8], [1, 1, 2], category="qa"),
)


def test_legacy_is_the_ratio_of_mean_speeds_with_the_baseline_tokenised_again() -> None:
    count = legacy(METHOD, BASELINE, with_start)
    assert count.tokens_per_second == (8 / 1.5 + 4 / 0.8) / 2
    assert count.baseline_tokens_per_second == (6 / 3.0 + 3 / 1.0) / 2  # 8 and 4 were emitted
    assert count.speedup == ((8 / 1.5 + 4 / 0.8) / 2) / 2.5
    assert count.compression_rate == 12 / 6


def test_corrected_is_the_ratio_of_total_speeds_of_emitted_ids() -> None:
    count = corrected(METHOD, BASELINE)
    assert count.tokens_per_second == pytest.approx(12 / 2.3)
    assert count.baseline_tokens_per_second == pytest.approx(12 / 4)
    assert count.speedup == pytest.approx(4 / 2.3)
    assert count.compression_rate == 2


def test_a_tokenizer_that_puts_nothing_in_front_costs_the_legacy_baseline_a_token_a_turn() -> None:
    count = legacy(METHOD, BASELINE, lambda text: with_start(text)[1:])
    assert count.baseline_tokens_per_second == (4 / 3.0 + 2 / 1.0) / 2


def test_legacy_does_not_notice_a_missing_answer_and_corrected_refuses_it() -> None:
    assert legacy(METHOD[:1], BASELINE, with_start).speedup == (8 / 1.5) / 2.5
    with pytest.raises(DataError, match="1 questions are answered by one side only, the first is 82"):
        corrected(METHOD[:1], BASELINE)


def test_legacy_reads_the_first_choice_and_corrected_all_of_them() -> None:
    more = [row.model_copy(update={"choices": [row.choices[0], METHOD[0].choices[0]]}) for row in BASELINE]
    method = [row.model_copy(update={"choices": row.choices * 2}) for row in METHOD]
    assert legacy(method, more, with_start) == legacy(METHOD, BASELINE, with_start)
    assert corrected(method, more).baseline_tokens_per_second == pytest.approx((12 + 16) / (4 + 3))
    with pytest.raises(DataError, match="a different number of times"):
        corrected(METHOD, more)


def test_failed_and_repeated_answers_are_refused() -> None:
    failed = rows(answer(81, ["ERROR", "a b"], [5, 3], [1.0, 0.5], [3, 2, 3]))
    with pytest.raises(DataError, match="the method failed on question 81"):
        corrected([*failed, METHOD[1]], BASELINE)
    with pytest.raises(DataError, match="the baseline answers question 82 twice"):
        corrected(METHOD, [*BASELINE, BASELINE[1]])


def test_a_file_is_read_as_the_original_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "kangaroo.jsonl"
    path.write_text(json.dumps(answer(81, ["a"], [2], [0.5], [2])) + "\n")
    assert legacy(read_answers(path), read_answers(path), with_start).tokens_per_second == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no answers in"),
        ("", "is empty"),
        ("{", "line 1: the row: Invalid JSON"),
        (json.dumps({"question_id": 1}), "line 1: choices: Field required"),
        (json.dumps(answer(1, ["a"], [2], [0.0], [2])), "each choice its wall time"),
        (json.dumps(answer(1, ["a"], [2], [0.5], [2], choices=[])), "needs a choice"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_answers(path)
