"""How far a ratio of totals would move had other questions of the same kind been asked."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95


def resample_totals(values: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Totals [resamples, ...] of values [questions, ...] over as many questions, drawn with replacement.

    All columns of a question come and go together, so that what was measured in pairs stays paired.
    """
    count = len(values)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    totals: Array = times @ values.reshape(count, -1)
    return totals.reshape(resamples, *values.shape[1:])


def interval(draws: Array) -> tuple[float, float]:
    """The percentile interval, at LEVEL, of draws [resamples]."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
