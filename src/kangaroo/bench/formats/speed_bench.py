"""SPEED-Bench's questions (Abramovich et al. 2026): one split by subject, and throughput splits by length of the input.

Assumed of its files, which are published apart from their texts: a line has `question_id`, `category`, `sub_category`
and `turns`. The categories are eleven subjects in the split "qualitative" and three degrees of entropy in the splits
"throughput_1k" to "throughput_32k", named for the tokens of their inputs. The lines themselves do not say which split
they belong to; it is read from `split` where a line has one, else from the name of the file or of its folder.

A task is a subject, or a throughput split, of which the degrees of entropy are the categories.
"""

import re

from kangaroo.bench.formats.row import Row
from kangaroo.bench.questions import Question

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
KEYS = frozenset({"turns", "sub_category"})


def question(row: Row) -> Question:
    """`question_id`, `category`, `turns`, and `split` where the file's name does not tell it."""
    split = row.one_of("split", SPLITS) if "split" in row.values else _split_in_name(row)
    category = row.one_of("category", SUBJECTS if split == QUALITATIVE else ENTROPIES)
    task = category if split == QUALITATIVE else split
    return Question(row.id("question_id"), task, category, row.texts("turns"), split=split, where=row.where)


def _split_in_name(row: Row) -> str:
    found = [part for part in re.split(r"[/\\.]", row.source) if part in SPLITS]
    if not found:
        raise row.error(f'to which split does it belong? Give it a "split", or name the file for it: {SPLITS[1]}.jsonl')
    return found[-1]
