"""What the paper reports, to stand beside what was measured here. Nothing in it was measured by this project."""

from collections.abc import Iterable
from dataclasses import dataclass

SOURCE = "Liu et al. 2024, arXiv 2404.18911v1: Spec-Bench, Vicuna, greedy, float16, batch 1, chains"
TASKS = {
    "translation": "Translation",
    "qa": "QA",
    "summarization": "Summarisation",
    "math_reasoning": "Maths",
    "rag": "RAG",
    "mt_bench": "MT-bench",
}
"""Spec-Bench's subtasks in the paper's order, and how they are shown."""


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the paper's table."""

    method: str
    size: str
    """Of the target."""
    compression_rates: tuple[float, ...]
    """In the order of TASKS."""
    speedups: tuple[float, ...]
    """Likewise."""
    average: float
    """Of the speed-ups, as printed."""


PAPER = (
    Published("Lookahead", "7B", (1.24, 1.56, 1.53, 1.96, 1.49, 1.70), (1.15, 1.21, 1.27, 1.51, 1.19, 1.40), 1.29),
    Published(
        "Medusa-1, chain", "7B", (1.58, 1.50, 1.49, 1.73, 1.51, 1.76), (1.41, 1.34, 1.32, 1.54, 1.29, 1.55), 1.41
    ),
    Published("REST", "7B", (1.54, 1.91, 1.64, 1.53, 1.92, 2.00), (1.26, 1.63, 1.33, 1.23, 1.46, 1.58), 1.43),
    Published("Kangaroo", "7B", (1.41, 1.87, 1.87, 2.14, 2.05, 2.22), (1.24, 1.43, 1.50, 1.61, 1.52, 1.68), 1.50),
    Published("Kangaroo", "13B", (1.45, 1.79, 2.00, 2.42, 2.16, 2.44), (1.18, 1.34, 1.41, 1.63, 1.40, 1.66), 1.44),
)


def in_order(tasks: Iterable[str]) -> list[str]:
    """Tasks without repetition: Spec-Bench's in the paper's order, then others as they come."""
    found = list(dict.fromkeys(tasks))
    return [*(task for task in TASKS if task in found), *(task for task in found if task not in TASKS)]
