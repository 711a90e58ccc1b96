"""What runs on a tiny chat model are made of, and how they are compared."""

from collections.abc import Callable
from typing import Any

from kangaroo.bench.recipe import BenchRecipe
from kangaroo.bench.records import Record

TIMES = {"prefill", "draft", "verify", "rest"}
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Where would you like to eat?", "Tonight?"]},
    {"question_id": 2, "category": "math", "turns": ["The answer is 42, naïve café.", "Why?"]},
    {"question_id": 3, "category": "qa", "turns": ["I need 3 tickets to Oakland."]},
    {"question_id": 4, "category": "qa", "turns": ["Where?"]},
]
TOKENS = 10
MakeRecipe = Callable[..., BenchRecipe]
EARLY = {"name": "early", "drafter": "early-exit", "exit_layer": 1, "threshold": 0.02}


def timeless(records: list[Record]) -> list[dict[str, Any]]:
    """Records but for their timings."""
    found = [record.model_dump() for record in records]
    for row in found:
        row["turns"] = [{key: value for key, value in turn.items() if key not in TIMES} for turn in row["turns"]]
    return found


def by_method(records: list[Record]) -> dict[str, list[Record]]:
    return {m: [r for r in records if r.method == m] for m in dict.fromkeys(r.method for r in records)}
