"""What the paper reports, to stand beside what was measured here. Nothing in it was measured by this project."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class PublishedPoint:
    """One setting of an experiment in the paper."""

    at: float | str
    """Its place on the axis of ours."""
    speedup: float
    compression_rate: float | None = None
    series: str = ""
    """Its line, by the name that ours has; empty where the experiment is a single one."""
    read_off: Literal["rate", "speedup"] | None = None
    """The figure that was read off a plot, to within 0.02."""
    millions: int | None = None
    """Trained parameters, in millions."""


EXIT_LAYERS = (
    PublishedPoint(0.0, 1.28, 1.43),
    PublishedPoint(2 / 32, 1.50, 2.02, read_off="rate"),
    PublishedPoint(4 / 32, 1.44, 2.33),
    PublishedPoint(8 / 32, 1.28, 2.61),
    PublishedPoint(16 / 32, 1.07, 3.39),
)
"""By the share of the layers that run before the exit."""
_BY_THRESHOLD = (
    ("gamma = 4", ((0, 1.36, 2.18), (0.3, 1.44, 2.14), (0.5, 1.47, 2.05), (0.7, 1.48, 1.95), (0.9, 1.40, 1.82))),
    (
        "gamma = 6",
        (
            (0, 1.20, 2.29),
            (0.3, 1.41, 2.22),
            (0.5, 1.46, 2.11),
            (0.6, 1.50, 2.06),
            (0.7, 1.48, 1.99),
            (0.9, 1.41, 1.83),
        ),
    ),
    ("gamma = 8", ((0, 1.11, 2.33), (0.3, 1.37, 2.25), (0.5, 1.48, 2.13), (0.7, 1.49, 2.00), (0.9, 1.44, 1.92))),
)
_READ_OFF: dict[tuple[str, float], Literal["rate", "speedup"]] = {
    ("gamma = 4", 0.5): "speedup",
    ("gamma = 4", 0.7): "speedup",
    ("gamma = 6", 0.6): "rate",
}
THRESHOLDS = tuple(
    PublishedPoint(eta, speedup, rate, series, _READ_OFF.get((series, eta)))
    for series, row in _BY_THRESHOLD
    for eta, speedup, rate in row
)
"""By eta; a line per gamma."""
ADAPTERS = (
    PublishedPoint("kangaroo", 1.50, millions=67),
    PublishedPoint("own-head", 1.44, millions=198),
    PublishedPoint("full-layer", 1.37, millions=202),
    PublishedPoint("mlp-only", 1.22, millions=165),
    PublishedPoint("medusa", 1.41, millions=591),
)
"""By what is trained."""
EXPERIMENTS = {"exit-layer": EXIT_LAYERS, "threshold": THRESHOLDS, "adapter": ADAPTERS}
"""The paper's ablations, by the name that a recipe calls them by. All are of Vicuna-7B."""


def in_order(tasks: Iterable[str]) -> list[str]:
    """Tasks without repetition: Spec-Bench's in the paper's order, then others as they come."""
    found = list(dict.fromkeys(tasks))
    return [*(task for task in TASKS if task in found), *(task for task in found if task not in TASKS)]
