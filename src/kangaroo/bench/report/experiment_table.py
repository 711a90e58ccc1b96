"""An experiment as one table: ours point by point, the paper's figures beside them and labelled as its own."""

from kangaroo.bench.report.experiment import Experiment, Place, Point
from kangaroo.bench.report.published import SOURCE, PublishedPoint
from kangaroo.bench.report.tables import UNKNOWN, Table, number, percent, span

WIDEST = 4
"""CTAR(w) is shown up to this w."""
AXIS, SERIES, GAIN = "", "series", "gain per million"
RATE, SPEEDUP, SIZE = "paper: CR", "paper: speed-up", "paper: parameters"
CURVE = tuple(f"CTAR({w})" for w in range(1, WIDEST + 1))
COLUMNS = (
    *(AXIS, SERIES, "speed-up", SPEEDUP, "CR", RATE, *CURVE),
    *("drafted per round", "plain tokens/s", "trained parameters", GAIN, SIZE),
)
NOTE = (
    "Speed-up over plain decoding of the same questions, and CR, mean tokens per round, with 95 % intervals over "
    "questions; CTAR(w), the share of rounds that emitted more than w tokens; plain decoding's own tokens per second."
)
PER_MILLION = "Gain: the speed-up beyond 1, per million trained parameters."
PAPERS = (
    f"The paper's figures, of another model on another machine: {SOURCE}, 7B; ~ was read off a plot, to within 0.02."
)


def experiment_table(experiment: Experiment) -> Table:
    """A row per point, and one per figure of the paper at a place where there is none of ours.

    Columns in which no row has anything are left out.
    """
    met = {id(point.published) for point in experiment.points}
    cells = [_ours(point) for point in experiment.points]
    cells += [_papers(point) for point in experiment.published if id(point) not in met]
    if not experiment.sizes_differ:
        cells = [{name: cell for name, cell in row.items() if name != GAIN} for row in cells]
    shown = [name for name in COLUMNS if any(name in row for row in cells)]
    rows = [tuple(row.get(name, UNKNOWN) for name in shown) for row in cells]
    notes = [NOTE, *([PER_MILLION] if GAIN in shown else []), *([PAPERS] if experiment.published else [])]
    return Table("experiment", "The experiment", " ".join(notes), (experiment.about.axis, *shown[1:]), rows)


def place_name(place: Place) -> str:
    """A place on the axis as it is shown."""
    return place if isinstance(place, str) else f"{place:.4g}"


def _ours(point: Point) -> dict[str, str]:
    """Cells by column; what is not known has none."""
    summary = point.summary
    curve = [*summary.acceptance, *[0.0] * WIDEST][:WIDEST] if summary.rounds else []
    cells = {
        "speed-up": span(summary.speedup),
        "CR": None if point.compression_rate is None else span(point.compression_rate),
        **dict(zip(CURVE, map(percent, curve), strict=False)),
        "drafted per round": number(summary.drafted_per_round),
        "plain tokens/s": f"{point.baseline:.1f}",
        "trained parameters": f"{point.parameters / 1e6:.2f} M" if point.parameters else None,
        GAIN: None if point.gain_per_million is None else number(point.gain_per_million),
    }
    known = {name: cell for name, cell in cells.items() if cell is not None}
    papers = {} if point.published is None else _papers(point.published)
    return papers | {AXIS: place_name(point.at), SERIES: point.series} | known


def _papers(point: PublishedPoint) -> dict[str, str]:
    """Likewise."""
    rate, speedup = ("~" if point.read_off == figure else "" for figure in ("rate", "speedup"))
    cells = {AXIS: place_name(point.at), SERIES: point.series or "paper", SPEEDUP: f"{speedup}{point.speedup:.2f}"}
    if point.compression_rate is not None:
        cells[RATE] = f"{rate}{point.compression_rate:.2f}"
    if point.millions is not None:
        cells[SIZE] = f"{point.millions} M"
    return cells
