"""Trainings that share what the target wrote for them."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo.files import write_atomically
from kangaroo.training.author import REGENERATED, WRITTEN
from kangaroo.training.reading import read_recipe
from kangaroo.training.report import Report
from kangaroo.training.resume import STATE
from kangaroo.training.run import train
from kangaroo.training.synthesis import SYNTHESISED

TEXTS = (WRITTEN, REGENERATED, SYNTHESISED)
"""What the target writes for a run. Each file says what it was written for, and is replaced where that is another."""


def train_beside(
    recipe: Path,
    data: Sequence[Path],
    others: Sequence[Path],
    *,
    overrides: Mapping[str, Any],
    report: Report = lambda _: None,
) -> Path:
    """As `train`, from the start or from where the run in the output folder stopped; returns the folder of the best.

    A run that starts takes the texts in the latest of the `others`, folders of trainings, that has them. Where its own
    would be the same, the target need not write them again.
    """
    folder = read_recipe(recipe, overrides).output
    started = (folder / STATE).is_file()
    if not started:
        for name in TEXTS:
            found = [other / name for other in others if (other / name).is_file()]
            if found and not (folder / name).exists():
                source = found[-1]
                write_atomically(folder / name, lambda part, source=source: shutil.copyfile(source, part))  # type: ignore[misc]
    return train(recipe, data, overrides=overrides, resume=started, report=report)
