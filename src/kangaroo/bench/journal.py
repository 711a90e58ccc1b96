"""The file of records: appended to block by block, and picked up again after any kind of end."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

from kangaroo.bench.questions import QuestionId
from kangaroo.bench.records import RECORDS, Record, read_records, refuse_strangers
from kangaroo.errors import DataError
from kangaroo.files import write_atomically, writing
from kangaroo.inputs import is_file, read_bytes
from kangaroo.sealed import seal


class Journal:
    """The records of a run. A question's answers by all methods in one repeat are there together, or not at all."""

    def __init__(self, folder: Path, methods: Sequence[str]):
        """Of records that a run left behind, those of a question that some method has not answered are dropped."""
        self.path, self._methods = folder / RECORDS, frozenset(methods)
        self.records = self._recover()
        with writing(self.path):
            self._file = self.path.open("ab", buffering=0)

    def has(self, question: QuestionId, repeat: int) -> bool:
        """Whether every method has answered a question in a repeat."""
        return (question, repeat) in self._done

    def append(self, records: Sequence[Record]) -> None:
        """Add the answers of all methods to one or more questions; they are on the disk when this returns."""
        data = _lines(records)
        with writing(self.path):
            # One write, so that a process that is killed leaves a torn last line at worst.
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, "the disk is full", str(self.path))
            os.fsync(self._file.fileno())
        self.records += records
        self._done |= _complete(records, self._methods)

    def close(self) -> None:
        """Nothing is appended any more."""
        self._file.close()

    def _recover(self) -> list[Record]:
        self._done: set[tuple[QuestionId, int]] = set()
        if not is_file(self.path):
            return []
        content = read_bytes(self.path, RECORDS, DataError)
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self._rewrite(whole)
        records = read_records(self.path.parent)
        refuse_strangers(records, self._methods, self.path.parent)
        self._done = _complete(records, self._methods)
        kept = [record for record in records if (record.question, record.repeat) in self._done]
        if len(kept) < len(records):
            self._rewrite(_lines(kept))
        return kept

    def _rewrite(self, content: bytes) -> None:
        write_atomically(self.path, lambda part: part.write_bytes(content))


def _lines(records: Sequence[Record]) -> bytes:
    # Plain ASCII, in which only the end of a record can look like the end of a line.
    rows = (json.dumps(seal(record.model_dump(mode="json")), separators=(",", ":")) for record in records)
    return "".join(f"{row}\n" for row in rows).encode("ascii")


def _complete(records: Sequence[Record], methods: frozenset[str]) -> set[tuple[QuestionId, int]]:
    """Questions and repeats that every method has answered."""
    seen: dict[tuple[QuestionId, int], set[str]] = {}
    for record in records:
        seen.setdefault((record.question, record.repeat), set()).add(record.method)
    return {key for key, answered in seen.items() if answered >= methods}
