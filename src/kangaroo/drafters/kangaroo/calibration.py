"""What a draft model's confidence is worth: how often tokens drafted with it are the target's own.

Measured at training time on held-out text that the target wrote, stored beside the adapter.
"""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kangaroo.checks import shown
from kangaroo.errors import AdapterError
from kangaroo.files import write_json
from kangaroo.inputs import is_file, read_object

FILE = "calibration.json"
BINS = 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """A curve from confidence to the chance of being right, and the chance after a right token."""

    confidence: tuple[float, ...]
    """Rising."""
    right: tuple[float, ...]
    """Not falling; between two confidences the chance lies on the line between theirs."""
    after_right: float
    """How often the token after one that is right is right too."""

    def chance(self, confidence: float) -> float:
        """The chance that a token drafted with this confidence is right."""
        x, y = self.confidence, self.right
        above = bisect.bisect_left(x, confidence)
        if above in (0, len(x)):
            return y[min(above, len(x) - 1)]
        share = (confidence - x[above - 1]) / (x[above] - x[above - 1])
        return y[above - 1] + share * (y[above] - y[above - 1])

    def chances(self, confidence: Tensor) -> Tensor:
        """The same of many confidences, in float64, to the last bit: where they are, nothing is read."""
        x, y = _points(self, confidence.device)
        confidence = confidence.double().contiguous()
        above = torch.searchsorted(x, confidence)
        low, high = (above - 1).clamp_min(0), above.clamp_max(len(x) - 1)
        share = (confidence - x[low]) / (x[high] - x[low])
        return torch.where(low == high, y[low], y[low] + share * (y[high] - y[low]))

    def save(self, folder: Path) -> None:
        """Write calibration.json."""
        write_json(folder / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Calibration":
        """Read calibration.json. Raises AdapterError if it is missing or damaged."""
        path = folder / FILE
        if not is_file(path):
            raise AdapterError(
                f"no {FILE} in {folder}: stop = 'auto' needs calibrated confidences, which `kangaroo train` writes "
                "beside an adapter; set a threshold instead, or train again"
            )
        table = read_object(path, FILE, AdapterError)
        try:
            found = cls(_chances(table["confidence"]), _chances(table["right"]), *_chances([table["after_right"]]))
            rising = all(a < b for a, b in pairwise(found.confidence))
            falling = any(a > b for a, b in pairwise(found.right))
            if falling or not (rising and len(found.confidence) == len(found.right) > 0):
                raise ValueError("the curve does not rise")
            return found
        except KeyError as error:
            raise AdapterError(f"{path} is damaged: {error} is missing") from None
        except ValueError as error:
            raise AdapterError(f"{path} is damaged: {error}") from None


@cache
def _points(calibration: Calibration, device: torch.device) -> tuple[Tensor, Tensor]:
    """The curve's points as tensors."""
    points = [calibration.confidence, calibration.right]
    x, y = torch.tensor(points, dtype=torch.float64, device=device).unbind()
    return x, y


def _chances(values: Any) -> tuple[float, ...]:
    """Probabilities, as a file should hold them."""
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not numbers or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"chances are numbers in [0, 1], got {shown(values)}")
    return tuple(map(float, values))


def calibrate(confidence: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Fit the curve to drafted tokens in their order: bins of equally many, then made to rise by pooling neighbours."""
    assert len(confidence) == len(right) > 0
    order = np.argsort(confidence, kind="stable")
    x, y = np.asarray(confidence, dtype=float)[order], np.asarray(right, dtype=float)[order]
    pools: list[tuple[float, float, int]] = []  # sums of confidences and of hits, and their number
    for part in np.array_split(np.arange(len(x)), min(BINS, len(x))):
        pools.append((float(x[part].sum()), float(y[part].sum()), len(part)))
        while len(pools) > 1 and _falls(pools[-2], pools[-1]):
            last, before = pools.pop(), pools.pop()
            pools.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    after = [now for before, now in pairwise(right) if before]
    return Calibration(
        tuple(total / count for total, _, count in pools),
        tuple(hits / count for _, hits, count in pools),
        sum(after) / max(1, len(after)),
    )


def _falls(before: tuple[float, float, int], last: tuple[float, float, int]) -> bool:
    """Whether two pools must become one: the chance falls, or the confidence does not rise."""
    return last[1] / last[2] < before[1] / before[2] or last[0] / last[2] <= before[0] / before[2]
