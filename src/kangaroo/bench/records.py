"""What a benchmark measured: one record per question, method and repeat. Everything published comes from these."""

from collections.abc import Collection, Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kangaroo.errors import DataError
from kangaroo.inputs import is_file, name_path, parse_json, read_text
from kangaroo.sealed import open_sealed

RECORDS = "records.jsonl"
BASELINE = "none"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Difference(_Frozen):
    """Where an answer first departs from the baseline's."""

    position: int
    """Place in the turn's tokens, from 0."""
    gap: float
    """Between the two best scores there; a tie in rounding is a small one."""
    tie: bool
    """Whether rounding explains it."""


class Measured(_Frozen):
    """One row's answer, by one method. Seconds are those of the batch, divided equally among its rows, of a device that
    was waited for.

    transformers' own generate does not tell its phases apart: its time is all `rest`, and it has no `drafted`, `stops`.
    """

    tokens: list[int]
    """Every emitted token id, an end-of-sequence token included."""
    finish_reason: str
    """"stop" or "length"."""
    prefill: float
    draft: float
    """Drafting, and what the drafter does with committed tokens."""
    verify: float
    """The target's pass over the drafts."""
    rest: float
    """Everything else in the rounds: acceptance, bookkeeping, detokenisation is not among it."""
    emitted: list[int]
    """Tokens emitted by each round, the target's own one included; sums to len(tokens)."""
    drafted: list[int] = []
    """Tokens drafted in each round."""
    stops: list[str] = []
    """Why drafting stopped in each round (tree.Stop values)."""
    peak_bytes: int | None = None
    """Most device memory allocated meanwhile; None where the device does not tell."""

    @property
    def seconds(self) -> float:
        """Prefill and decoding."""
        return self.prefill + self.draft + self.verify + self.rest


class Turn(Measured):
    """An answer in its conversation."""

    prompt_tokens: int
    dropped_tokens: int
    """Prompt tokens left out from the middle because the context would not hold them; not part of prompt_tokens."""
    difference: Difference | None = None
    """From the baseline's answer of the same repeat. None if identical, if this is the baseline, or if a difference in
    an earlier turn had changed the prompt."""


class Record(_Frozen):
    """One method's answer to one question."""

    question: int | str
    task: str
    """Spec-Bench's subtask, or the kind of prompt."""
    category: str
    method: str
    """Its name in the recipe; BASELINE is plain decoding in the same loop."""
    repeat: int
    turns: list[Turn]
    exactness: str | None = None
    """What the target promised (`Exactness.level`); None in records from before it was tried."""

    @property
    def key(self) -> tuple[int | str, str, int]:
        """What no two records of a run share."""
        return self.question, self.method, self.repeat


def read_records(folder: Path) -> list[Record]:
    """The records of a run's folder, in the order they were made.

    Raises DataError naming the line of a malformed row, and if a record occurs twice.
    """
    path = folder / RECORDS
    if not is_file(path):
        raise DataError(f"no records in {name_path(folder)}: expected {RECORDS}, as written by `kangaroo bench`")
    # Not splitlines, which also splits at separators that JSON strings may hold.
    lines = read_text(path, RECORDS, DataError).removesuffix("\n")
    records = list(parse_records(lines.split("\n") if lines else [], str(path)))
    seen: set[tuple[int | str, str, int]] = set()
    for record in records:
        if record.key in seen:
            raise DataError(f"{path}: question {record.question}, {record.method}, repeat {record.repeat} occurs twice")
        seen.add(record.key)
    return records


def refuse_strangers(records: Iterable[Record], methods: Collection[str], folder: Path) -> None:
    """Raise DataError for a record of a method that the run does not have; the baseline is one that it has."""
    for record in records:
        if record.method != BASELINE and record.method not in methods:
            raise DataError(
                f"{name_path(folder / RECORDS)} holds an answer by {record.method!r} to question {record.question}, "
                "which the run's recipe does not have: delete its lines, or give a new --output"
            )


def parse_records(lines: Iterable[str], name: str) -> Iterable[Record]:
    """Records from JSON lines; `name` says in errors where they came from."""
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        row = parse_json(line, where, DataError)
        try:
            yield Record.model_validate(open_sealed(row, where, DataError) if isinstance(row, dict) else row)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the row"
            raise DataError(f"{where}: {place}: {first['msg']}") from None
