"""Files of questions: JSON lines in one of several formats, told apart by the keys of their first line."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kangaroo.bench.formats import conversations, gsm8k, human_eval, plain, spec_bench, speed_bench
from kangaroo.bench.formats.row import Row
from kangaroo.bench.questions import Question, refuse_duplicates
from kangaroo.documents import parse_line
from kangaroo.errors import ConfigError, DataError


class Format(NamedTuple):
    """A line with these keys is read so."""

    keys: frozenset[str]
    question: Callable[[Row], Question]


FORMATS: dict[str, Format] = {
    "evaluation prompts": Format(conversations.KEYS, conversations.question),
    "SPEED-Bench": Format(speed_bench.KEYS, speed_bench.question),
    "Spec-Bench": Format(spec_bench.KEYS, spec_bench.question),
    "HumanEval": Format(human_eval.KEYS, human_eval.question),
    "GSM8K": Format(gsm8k.KEYS, gsm8k.question),
    "prompts": Format(plain.KEYS, plain.question),
}
"""The first whose keys are all there is taken, so those that need more keys come before those that need fewer."""


def read_questions(content: bytes, source: str, split: str | None = None) -> list[Question]:
    """The questions in a file's content, gzipped or not, in the order of its lines; of `split` alone if given.

    Raises DataError naming the line that is malformed or repeats an id, ConfigError for a split that is not there.
    """
    rows = list(_rows(_text(content, source), source))
    if not rows:
        raise DataError(f"{source} holds no questions")
    chosen = _find_format(rows[0])
    questions = [chosen.question(row) for row in rows]
    refuse_duplicates(questions)
    if split is None:
        return questions
    splits = sorted({question.split for question in questions if question.split is not None})
    if split not in splits:
        has = f"it has {', '.join(splits)}" if splits else "it is not divided into splits"
        raise ConfigError(f"{source} has no split {split!r}; {has}")
    return [question for question in questions if question.split == split]


def _text(content: bytes, source: str) -> str:
    try:
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source} is not JSON lines: {error}") from None


def _rows(text: str, source: str) -> Iterator[Row]:
    # Not splitlines, which also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(_parse(line, f"{source}, line {number}"), source, number)


def _parse(line: str, where: str) -> dict[str, Any]:
    values = parse_line(line, where)
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected a JSON object, got {line[:40]!r}")
    return values


def _find_format(row: Row) -> Format:
    for known in FORMATS.values():
        if known.keys <= row.values.keys():
            return known
    wanted = "; ".join(f"{name}: {', '.join(sorted(known.keys))}" for name, known in FORMATS.items())
    raise row.error(f"in no known format: it has the keys {', '.join(row.values) or 'none'}; known are {wanted}")
