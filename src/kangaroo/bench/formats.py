"""Files of questions: JSON lines in one of several formats, told apart by the keys of their first line."""

import gzip
import http.client
import re
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kangaroo.bench.questions import EvaluationPrompt, Question, QuestionId, refuse_duplicates
from kangaroo.chat import are_messages
from kangaroo.checks import shown
from kangaroo.errors import ConfigError, DataError
from kangaroo.inputs import decode, parse_json, read_bytes

TIMEOUT = 60
"""Seconds without an answer."""


def fetch(name: str) -> bytes:
    """The content of a file, or of what an http(s) address leads to, which is kept in memory only.

    Raises DataError if there is none.
    """
    if name.startswith(("http://", "https://")):
        return _download(name)
    return read_bytes(Path(name), "file of questions (or address that begins with http:// or https://)", DataError)


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        raise DataError(f"cannot fetch {address}: {error}") from None


@dataclass(frozen=True, slots=True)
class Row:
    """A JSON object and where it stands. What it lacks, or holds wrongly, raises DataError."""

    values: Mapping[str, Any]
    source: str
    """The file or address."""
    number: int
    """Its line, from 1."""

    @property
    def where(self) -> str:
        """For error messages."""
        return f"{self.source}, line {self.number}"

    def error(self, message: str) -> DataError:
        """An error about this line."""
        return DataError(f"{self.where}: {message}")

    def text(self, key: str) -> str:
        """A string that is not blank."""
        value = self._value(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{key!r} must be a non-empty string, got {shown(value)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of one or more such strings."""
        value = self._value(key)
        if not isinstance(value, list) or not value or not all(isinstance(x, str) and x.strip() for x in value):
            raise self.error(f"{key!r} must be a non-empty list of non-empty strings, got {shown(value)}")
        return tuple(value)

    def id(self, key: str) -> QuestionId:
        """A whole number or a string that is not blank."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise self.error(f"{key!r} must be a whole number or a non-empty string, got {shown(value)}")
        return value

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        """A string from a list."""
        value = self._value(key)
        if value not in known:
            raise self.error(f"unknown {key} {shown(value)}; it must be one of {', '.join(known)}")
        return str(value)

    def messages(self, key: str) -> tuple[dict[str, str], ...]:
        """A conversation that waits for an answer: {"role", "content"} objects, the last one a user's."""
        value = self._value(key)
        if not are_messages(value) or value[-1]["role"] != "user":
            raise self.error(
                f'{key!r} must be a list of {{"role", "content"}} objects that ends with a user\'s, got {shown(value)}'
            )
        return tuple(value)

    def _value(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(f"{key!r} is missing")
        return self.values[key]


def _conversation(row: Row) -> Question:
    """The project's own evaluation prompts: `id`, `kind`, `messages`.

    The last message is the turn, the others go before it. The id decides the split.
    """
    name, kind = row.text("id"), row.text("kind")
    *history, last = row.messages("messages")
    split = EvaluationPrompt(name, kind, [*history, last]).split
    return Question(name, kind, kind, (last["content"],), tuple(history), split, row.where)


SUBJECTS = (
    "coding",
    "humanities",
    "math",
    "multilingual",
    "qa",
    "rag",
    "reasoning",
    "roleplay",
    "stem",
    "summarization",
    "writing",
)
ENTROPIES = ("low_entropy", "mixed", "high_entropy")
QUALITATIVE = "qualitative"
SPLITS = (QUALITATIVE, *(f"throughput_{length}" for length in ("1k", "2k", "8k", "16k", "32k")))


def _speed_bench(row: Row) -> Question:
    """SPEED-Bench (Abramovich et al. 2026): `question_id`, `category`, `turns`; `split` where no name tells it.

    Assumed of its files, which are published apart from their texts: the categories are eleven subjects in the split
    "qualitative" and three degrees of entropy in the splits "throughput_1k" to "throughput_32k", named for the tokens
    of their inputs. The split is read from `split` where a line has one, else from the name of the file or its folder.
    A task is a subject, or a throughput split, of which the degrees of entropy are the categories.
    """
    split = row.one_of("split", SPLITS) if "split" in row.values else _split_in_name(row)
    category = row.one_of("category", SUBJECTS if split == QUALITATIVE else ENTROPIES)
    task = category if split == QUALITATIVE else split
    return Question(row.id("question_id"), task, category, row.texts("turns"), split=split, where=row.where)


def _split_in_name(row: Row) -> str:
    found = [part for part in re.split(r"[/\\.]", row.source) if part in SPLITS]
    if not found:
        raise row.error(f'to which split does it belong? Give it a "split", or name the file for it: {SPLITS[1]}.jsonl')
    return found[-1]


MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""The categories that make up the subtask mt_bench; every other subtask is one category."""
CATEGORIES = (*MT_BENCH, "translation", "summarization", "qa", "math_reasoning", "rag")


def task_of(category: str) -> str:
    """The subtask that a category belongs to."""
    return "mt_bench" if category in MT_BENCH else category


def _spec_bench(row: Row) -> Question:
    """Spec-Bench (Xia et al. 2024): `question_id`, `category`, `turns`; a `reference` is not read."""
    category = row.one_of("category", CATEGORIES)
    return Question(row.id("question_id"), task_of(category), category, row.texts("turns"), where=row.where)


def _human_eval(row: Row) -> Question:
    """HumanEval's functions to complete (Chen et al. 2021): `task_id`, `prompt`; solutions and tests are not read."""
    return Question(row.id("task_id"), "humaneval", "humaneval", (row.text("prompt"),), where=row.where)


def _gsm8k(row: Row) -> Question:
    """GSM8K's word problems (Cobbe et al. 2021), known by their line: `question`; the `answer` is not read."""
    return Question(row.number, "gsm8k", "gsm8k", (row.text("question"),), where=row.where)


def _prompt(row: Row) -> Question:
    """One prompt to a line: `prompt`.

    `id` (else the line's number), `task` and `category` (else "prompts" and the task) are optional.
    """
    name = row.id("id") if "id" in row.values else row.number
    task = row.text("task") if "task" in row.values else "prompts"
    category = row.text("category") if "category" in row.values else task
    return Question(name, task, category, (row.text("prompt"),), where=row.where)


class Format(NamedTuple):
    """A line with these keys is read so."""

    keys: frozenset[str]
    question: Callable[[Row], Question]


FORMATS: dict[str, Format] = {
    "evaluation prompts": Format(frozenset({"messages"}), _conversation),
    "SPEED-Bench": Format(frozenset({"turns", "sub_category"}), _speed_bench),
    "Spec-Bench": Format(frozenset({"turns"}), _spec_bench),
    "HumanEval": Format(frozenset({"task_id", "prompt"}), _human_eval),
    "GSM8K": Format(frozenset({"question", "answer"}), _gsm8k),
    "prompts": Format(frozenset({"prompt"}), _prompt),
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
        plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source} is not JSON lines: {error}") from None
    return decode(plain, source, DataError)


def _rows(text: str, source: str) -> Iterator[Row]:
    # Not splitlines, which also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Row(_parse(line, f"{source}, line {number}"), source, number)


def _parse(line: str, where: str) -> dict[str, Any]:
    values = parse_json(line, where, DataError)
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected a JSON object, got {line[:40]!r}")
    return values


def _find_format(row: Row) -> Format:
    for known in FORMATS.values():
        if known.keys <= row.values.keys():
            return known
    wanted = "; ".join(f"{name}: {', '.join(sorted(known.keys))}" for name, known in FORMATS.items())
    raise row.error(f"in no known format: it has the keys {', '.join(row.values) or 'none'}; known are {wanted}")
