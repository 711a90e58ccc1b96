"""Answer files that Spec-Bench's own scripts read, made from the records of a run."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from kangaroo.bench.questions import QuestionId
from kangaroo.bench.records import Record
from kangaroo.files import write_text
from kangaroo.text import Tokenizer

ANSWERS = "answers"


def write_answers(folder: Path, records: Sequence[Record], tokenizer: Tokenizer, started: str) -> None:
    """Write answers/METHOD.jsonl, one line per question with a choice per repeat; `started` becomes their time stamp.

    A pure function of its arguments: the same records give the same files.
    """
    stamp = datetime.fromisoformat(started).timestamp()
    for method in dict.fromkeys(record.method for record in records):
        answered: dict[QuestionId, list[Record]] = {}
        for record in records:
            if record.method == method:
                answered.setdefault(record.question, []).append(record)
        rows = [_row(answered[question], tokenizer, stamp) for question in sorted(answered, key=_natural)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = folder / ANSWERS / f"{method}.jsonl"
        write_text(path, text)


def _natural(question: QuestionId) -> tuple[bool, int, str]:
    """Numbers in their order, then names in theirs."""
    return (False, question, "") if isinstance(question, int) else (True, 0, question)


def _row(repeats: Sequence[Record], tokenizer: Tokenizer, stamp: float) -> dict[str, Any]:
    first = repeats[0]
    return {
        "question_id": first.question,
        "category": first.category,
        "answer_id": hashlib.sha256(f"{first.method} {first.question}".encode()).hexdigest()[:22],
        "model_id": first.method,
        "choices": [_choice(record, tokenizer) for record in sorted(repeats, key=lambda record: record.repeat)],
        "tstamp": stamp,
    }


def _choice(record: Record, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "index": record.repeat,
        "turns": [tokenizer.decode(turn.tokens) for turn in record.turns],
        "decoding_steps": [len(turn.emitted) for turn in record.turns],
        "new_tokens": [len(turn.tokens) for turn in record.turns],
        "wall_time": [turn.seconds for turn in record.turns],
        "accept_lengths": [length for turn in record.turns for length in turn.emitted],
    }
