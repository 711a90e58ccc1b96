"""An experiment as one plot and one table, the paper's figures beside ours and labelled as its own."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kangaroo.bench.published import PublishedPoint
from kangaroo.bench.report.experiment import Experiment, Place, Point
from kangaroo.bench.report.plots import WIDE, Look, Plot, list_methods, look
from kangaroo.bench.report.svg import INK, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from kangaroo.bench.published import SOURCE
from kangaroo.bench.report.tables import UNKNOWN, Table, number, percent, span

WIDE_RANGE = 16
"""Places whose largest is at least so many times the smallest are spread by their logarithm."""
NARROWEST = 0.07
"""Share of the axis between two ticks at least."""
BETWEEN = 0.8
"""Room that the series of a place take, where places are a list."""


def experiment_plot(experiment: Experiment, prefix: str) -> Plot:
    """Places that are numbers run to the right, with a line per series; others are listed from top to bottom."""
    numbers = any(not isinstance(point.at, str) for point in experiment.points)
    text = "; ".join(f"{p.series} at {place_name(p.at)}: {p.summary.speedup.value:.2f}" for p in experiment.points)
    entries = len(experiment.series) + len({point.series for point in experiment.published})
    legend = 0.22 * ((entries + 1) // 2)
    if numbers:
        svg = draw(f"{prefix}-experiment", WIDE, 3.2 + legend, lambda axes: _paint_lines(axes, experiment))
    else:
        rows = len({point.at for point in experiment.points}) * max(1.0, 0.6 * len(experiment.series))
        svg = draw(f"{prefix}-experiment", WIDE, 1.2 + 0.3 * rows + legend, lambda axes: _paint_list(axes, experiment))
    return Plot(svg, f"{experiment.about.title}. Speed-up by {experiment.about.axis}: {text}", WIDE)


def _paint_lines(axes: "Axes", experiment: Experiment) -> None:
    found = _places(experiment)
    numbers = [place for place in found if not isinstance(place, str)]
    positive = [place for place in numbers if place > 0]
    if len(positive) == len(numbers) and max(positive) >= WIDE_RANGE * min(positive):
        axes.set_xscale("log", base=2)
    axes.axhline(1, color=INK, linewidth=0.9)
    for place, series in enumerate(experiment.series):
        _line(axes, [p for p in experiment.points if p.series == series], found, look(place))
    for series in dict.fromkeys(point.series for point in experiment.published):
        theirs = [point for point in experiment.published if point.series == series]
        _paper_line(axes, theirs, _look_beside(series, experiment))
    axes.set_xticks([], minor=True)
    _mark_places(axes, found)
    axes.set_xlabel(experiment.about.axis)
    axes.set_ylabel("times as fast as plain decoding")
    axes.grid(axis="y")
    axes.figure.legend(loc="outside lower center", ncols=2)


def _places(experiment: Experiment) -> dict[Place, float]:
    """Where each place is drawn: numbers where they are, in their order, texts one after the other behind them."""
    ours = [point.at for point in experiment.points]
    numbers = sorted({place for place in ours if not isinstance(place, str)})
    texts = dict.fromkeys(place for place in ours if isinstance(place, str))
    last = numbers[-1]
    step = (last - numbers[0]) / max(1, len(numbers) - 1) or 1.0
    return {**{place: place for place in numbers}, **{text: last + (i + 1) * step for i, text in enumerate(texts)}}


def _mark_places(axes: "Axes", found: dict[Place, float]) -> None:
    """A tick at every place, unless they are all numbers and too close for their names."""
    spread = [axes.transData.transform((place, 1))[0] for place in sorted(found.values())]
    near = min((after - before for before, after in pairwise(spread)), default=0.0)
    if near >= NARROWEST * (spread[-1] - spread[0]) or any(isinstance(place, str) for place in found):
        axes.set_xticks(list(found.values()), [place_name(place) for place in found])


def _line(axes: "Axes", points: Sequence[Point], places: dict[Place, float], drawn: Look) -> None:
    for point in points:
        axes.vlines(places[point.at], *_ends(point), color=drawn.colour, linewidth=1.2)
    apart = [point for point in points if isinstance(point.at, str)]
    joined = sorted((point for point in points if point not in apart), key=lambda point: places[point.at])
    label: str | None = points[0].series
    for some, line in ((joined, drawn.line), (apart, "none")):
        if some:
            across, up = [places[point.at] for point in some], [point.summary.speedup.value for point in some]
            axes.plot(across, up, **_style(drawn), linestyle=line, linewidth=1.5, label=label)
            label = None


def _ends(point: Point) -> tuple[float, float]:
    estimate = point.summary.speedup
    low, high = estimate.low, estimate.high
    return estimate.value if low is None else low, estimate.value if high is None else high


def _look_beside(series: str, experiment: Experiment) -> Look:
    """As our line of the same name; else a look that none of ours has."""
    ours = experiment.series
    return look(ours.index(series) if series in ours else len(ours))


def _paper_line(axes: "Axes", points: Sequence[PublishedPoint], drawn: Look) -> None:
    numbers = [(point.at, point.speedup) for point in points if not isinstance(point.at, str)]
    if numbers:
        across, up = zip(*sorted(numbers), strict=True)
        axes.plot(across, up, **_hollow(drawn), linestyle=(0, (2, 2)), linewidth=1, label=_paper_name(points[0].series))


def _style(drawn: Look) -> dict[str, Any]:
    return {"color": drawn.colour, "marker": drawn.marker, "markersize": 6}


def _hollow(drawn: Look) -> dict[str, Any]:
    return _style(drawn) | {"markerfacecolor": "white"}


def _paper_name(series: str) -> str:
    return f"{series} (paper)" if series else "paper"


def _paint_list(axes: "Axes", experiment: Experiment) -> None:
    names = list(dict.fromkeys(str(point.at) for point in experiment.points))
    axes.axvline(1, color=INK, linewidth=0.9)
    count = len(experiment.series)
    single = all(sum(point.at == name for point in experiment.points) == 1 for name in names)
    for place, series in enumerate(experiment.series):
        drawn = look(place)
        offset = 0.0 if single else BETWEEN * ((place + 0.5) / count - 0.5)
        ours = [point for point in experiment.points if point.series == series]
        down = [names.index(str(point.at)) + offset for point in ours]
        for point, at in zip(ours, down, strict=True):
            axes.hlines(at, *_ends(point), color=drawn.colour, linewidth=1.5)
        values = [point.summary.speedup.value for point in ours]
        axes.plot(values, down, **_style(drawn), linestyle="none", label=series)
    theirs = [(point.speedup, names.index(str(point.at))) for point in experiment.published if point.at in names]
    if theirs:
        across, places = zip(*theirs, strict=True)
        axes.plot(across, places, **_hollow(look(count)), linestyle="none", label=_paper_name(""))
    list_methods(axes, names)
    axes.set_xlabel("times as fast as plain decoding")
    axes.figure.legend(loc="outside lower center", ncols=2)


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
