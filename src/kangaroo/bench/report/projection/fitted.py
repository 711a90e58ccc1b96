"""The machine that pieces were timed on, as two numbers: seconds per launch, and bytes or operations per second.

Only timings of pieces go in, never a speed-up. Whether bytes or operations limit the machine is not said beforehand:
each is tried, and what comes closer to the timings is kept.
"""

import math

import numpy as np

from kangaroo.bench.report.projection.passes import Hardware, Pieces, Work
from kangaroo.bench.report.statistics import Array
from kangaroo.drafters.kangaroo.costs import Costs
from kangaroo.errors import DataError


def fit_hardware(name: str, pieces: Pieces, costs: Costs) -> Hardware:
    """By least squares in seconds: a round adds its pieces up, so a second too much is as bad in any of them.

    `pieces` must have the nodes of `costs`. Raises DataError for timings that launches and a rate do not explain.
    """
    pairs = _pairs(pieces, costs)
    seconds = np.array([took for _, took in pairs])
    kernels = np.array([work.kernels for work, _ in pairs])
    fits = []
    for kind in ("bytes", "flops"):
        load = np.array([getattr(work, kind) for work, _ in pairs])
        launch, per_unit, error = _solve(kernels, load, seconds)
        if launch >= 0 and per_unit > 0:
            fits.append((error, kind, launch, per_unit))
    if not fits:
        raise DataError(f"the pieces timed on {name} cannot be told into launches and reading; measure them again")
    _, kind, launch, per_unit = min(fits)
    return Hardware(
        name=name,
        bytes_per_second=1 / per_unit if kind == "bytes" else math.inf,
        flops_per_second=1 / per_unit if kind == "flops" else math.inf,
        launch_seconds=launch,
    )


def _pairs(pieces: Pieces, costs: Costs) -> list[tuple[Work, float]]:
    """Pieces and what they took; those that a method lacks are left out."""
    pairs = [(getattr(pieces, name), getattr(costs, name)) for name in ("full_step", "shallow", "adapter", "head")]
    pairs += [(pieces.verify[nodes], seconds) for nodes, seconds in costs.verify.items()]
    return [(work, seconds) for work, seconds in pairs if seconds > 0]


def _solve(kernels: Array, load: Array, seconds: Array) -> tuple[float, float, float]:
    """Seconds per kernel, seconds per unit of load, and the sum of squared errors."""
    columns = np.stack([kernels, load], 1)
    # Kernels are hundreds and operations millions: brought to one size, neither is lost in rounding.
    scale = columns.max(0)
    launch, per_unit = np.linalg.lstsq(columns / scale, seconds, rcond=None)[0] / scale
    errors = kernels * launch + load * per_unit - seconds
    return float(launch), float(per_unit), float(errors @ errors)
