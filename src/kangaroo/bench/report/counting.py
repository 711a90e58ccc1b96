"""Two counts of one speed, from answer files in Spec-Bench's format: as the original's script counts, and corrected.

**Legacy** repeats the arithmetic of the original's `evaluation/speed.py` (github.com/hemingkx/Spec-Bench), so that its
figures can stand beside published ones. Of every answer it reads the first choice. An answer's speed is its tokens over
its wall time, turns added up. The method's tokens are its own counter's; the baseline's are its text, tokenised again,
less one per turn for the token that a tokenizer puts in front, whether or not it puts one there, and without the
end-of-sequence token that was emitted. Each side's speeds are averaged over answers, however short, and the speed-up is
the ratio of the two means. The two files are read apart: an answer that is missing from one of them goes unnoticed.

**Corrected** counts the ids that were emitted, for both sides, and is total tokens over total wall time, all choices
together. A question that only one file answers, or that was answered by an error, is refused.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kangaroo.errors import DataError
from kangaroo.inputs import is_file, read_text

FAILED = "ERROR"
"""What the original writes in place of a turn that raised, beside the tokens and the time of another turn."""


class Choice(BaseModel):
    """One answer. Lists have an entry per turn, but for `accept_lengths`: tokens emitted per round, turns joined."""

    model_config = ConfigDict(frozen=True)

    turns: list[str]
    new_tokens: list[int]
    wall_time: list[float]
    accept_lengths: list[int]


class AnswerRow(BaseModel):
    """A line of an answer file; what is not needed here is left unread."""

    model_config = ConfigDict(frozen=True)

    question_id: int | str
    choices: list[Choice]


@dataclass(frozen=True, slots=True)
class Count:
    """One count of a method's speed on one task."""

    tokens_per_second: float
    baseline_tokens_per_second: float
    speedup: float
    compression_rate: float | None
    """Mean tokens per round; None where a file does not tell its rounds."""


def read_answers(path: Path) -> list[AnswerRow]:
    """The lines of an answer file. Raises DataError naming a malformed one, or if the file is missing or empty."""
    if not is_file(path):
        raise DataError(f"no answers in {path}: expected a JSONL file in Spec-Bench's format")
    rows = []
    lines = [line for line in read_text(path, "file of answers", DataError).split("\n") if line]
    for number, line in enumerate(lines, 1):
        try:
            row = AnswerRow.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the row"
            raise DataError(f"{path}, line {number}: {where}: {first['msg']}") from None
        if not row.choices or any(sum(choice.wall_time) <= 0 for choice in row.choices):
            raise DataError(f"{path}, line {number}: an answer needs a choice, and each choice its wall time")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty: expected a JSONL file in Spec-Bench's format")
    return rows


def legacy(
    method: Sequence[AnswerRow], baseline: Sequence[AnswerRow], tokenise: Callable[[str], Sequence[int]]
) -> Count:
    """What the original's script prints for these answers, to the digit.

    `tokenise` is the tokenizer as it is called on a text: with whatever it puts in front.
    """
    speeds = [sum(row.choices[0].new_tokens) / sum(row.choices[0].wall_time) for row in method]
    plain = [
        sum(len(tokenise(turn)) - 1 for turn in row.choices[0].turns) / sum(row.choices[0].wall_time)
        for row in baseline
    ]
    accepted = [length for row in method for length in row.choices[0].accept_lengths]
    # numpy's mean adds in pairs; another way of adding would differ in the last digits.
    speed, plain_speed = float(np.array(speeds).mean()), float(np.array(plain).mean())
    speedup = speed / plain_speed if plain_speed else math.inf  # answers of one token each count as none
    return Count(speed, plain_speed, speedup, float(np.mean(accepted)) if accepted else None)


def corrected(method: Sequence[AnswerRow], baseline: Sequence[AnswerRow]) -> Count:
    """Emitted tokens over wall time, totals on both sides.

    Raises DataError if the two do not answer the same questions, or if an answer is an error.
    """
    _check_pairs(method, baseline)
    speed, plain_speed = _total_speed(method), _total_speed(baseline)
    lengths = [length for row in method for choice in row.choices for length in choice.accept_lengths]
    return Count(speed, plain_speed, speed / plain_speed, sum(lengths) / len(lengths) if lengths else None)


def _total_speed(rows: Sequence[AnswerRow]) -> float:
    choices = [choice for row in rows for choice in row.choices]
    return sum(sum(choice.new_tokens) for choice in choices) / sum(sum(choice.wall_time) for choice in choices)


def _check_pairs(method: Sequence[AnswerRow], baseline: Sequence[AnswerRow]) -> None:
    for name, rows in (("the method", method), ("the baseline", baseline)):
        ids = [row.question_id for row in rows]
        if len(set(ids)) < len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise DataError(f"{name} answers question {twice} twice; start from an empty answer file")
        failed = [row.question_id for row in rows if any(FAILED in choice.turns for choice in row.choices)]
        if failed:
            raise DataError(f"{name} failed on question {failed[0]}: its answer is {FAILED!r}; run it again")
    mine, theirs = ({row.question_id: len(row.choices) for row in rows} for rows in (method, baseline))
    if mine.keys() != theirs.keys():
        odd = sorted(map(str, mine.keys() ^ theirs.keys()))
        raise DataError(f"{len(odd)} questions are answered by one side only, the first is {odd[0]}; run them again")
    if mine != theirs:
        raise DataError("method and baseline answered some question a different number of times; run them again")
