"""Projections: what Kangaroo's chain might gain on models and machines that nobody here has run. None is a measurement.

From a trace of rounds (`trace.py`), a model's shape (`shapes.py`) and a machine's numbers (`passes.py`), and nothing
else: the trace's drafts and acceptance, at the cost of passes. Between passes nothing happens and nothing is waited
for, so a projection says what an implementation could reach. `fitted.py` makes the numbers of a machine from timed
pieces, `known.py` has those of others, `table.py` shows what comes out.
"""

import numpy as np

from kangaroo.bench.report.projection.passes import Hardware, make_pieces
from kangaroo.bench.report.projection.shapes import Shape
from kangaroo.bench.report.projection.trace import Trace
from kangaroo.bench.report.statistics import Estimate, ratio
from kangaroo.drafters.kangaroo.adapter import Variant
from kangaroo.drafters.kangaroo.costs import CONTEXT


def project(
    trace: Trace,
    shape: Shape,
    hardware: Hardware,
    exit_layer: int,
    adapter: Variant | None = "kangaroo",
    context: int = CONTEXT,
) -> Estimate:
    """The projected speed-up of decoding at batch 1, after `context` tokens; without an adapter, of early exit.

    Its interval resamples the trace's questions. So it speaks of other text, and not of how wrong the costs may be.
    Raises ConfigError for an exit layer that the shape does not have.
    """
    costs = make_pieces(shape, exit_layer, adapter, nodes=trace.longest + 1, context=context).costs(hardware)
    steps = np.array([1 / costs.bound([drafted], 1) for drafted in range(trace.longest + 1)])
    emitted = np.arange(trace.counts.shape[2])
    # A round's tokens, and its cost in plain steps: all that resampling has to add up.
    return ratio(np.stack([trace.counts.sum(1) @ emitted, trace.counts.sum(2) @ steps], 1))
