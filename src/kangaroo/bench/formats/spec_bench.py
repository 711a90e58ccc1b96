"""Spec-Bench's questions (Xia et al. 2024): six subtasks, one of which, MT-bench, is made of eight categories."""

from kangaroo.bench.formats.row import Row
from kangaroo.bench.questions import Question

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""The categories that make up the subtask mt_bench; every other subtask is one category."""
CATEGORIES = (*MT_BENCH, "translation", "summarization", "qa", "math_reasoning", "rag")
KEYS = frozenset({"turns"})


def task_of(category: str) -> str:
    """The subtask that a category belongs to."""
    return "mt_bench" if category in MT_BENCH else category


def question(row: Row) -> Question:
    """`question_id`, `category`, `turns`; a `reference` answer is not needed and not read."""
    category = row.one_of("category", CATEGORIES)
    return Question(row.id("question_id"), task_of(category), category, row.texts("turns"), where=row.where)
