"""A run as plots, told apart by marker, hatch and line style as well as by colour."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kangaroo.bench.report.grid import OVERALL
from kangaroo.bench.report.results import Run
from kangaroo.bench.report.statistics import PHASES, Summary
from kangaroo.bench.report.svg import FAINT, INK, draw
from kangaroo.bench.report.tables import method_name, task_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL, WIDE = 3.3, 4.8
"""Inches: a panel among others, and a plot by itself. On a phone both keep legible type."""
# Okabe and Ito's colours, which the colour-blind tell apart too, without their yellow, too light for lines on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3478b", "#b8860b", "#3a9bd1", "#4d4d4d", "#8c510a", "#5e3c99", "#1b7837")
MARKERS = "os^DvPX*<>p"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
PHASE_LOOKS = {
    "prefill": ("#e4e8eb", "xxx"),
    "draft": ("#f2b680", "///"),
    "verify": ("#8fbfe0", ""),
    "rest": ("#ffffff", "\\\\\\"),
}
MEASURED, PASSES, WEIGHTS = "measured", "bound: passes", "bound: weights"


class Look(NamedTuple):
    """How a method is drawn, in every plot alike."""

    colour: str
    marker: str
    line: Any


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture, and what it shows, for those who do not see it."""

    svg: str
    description: str
    width: float


def make_plots(run: Run, prefix: str) -> dict[str, list[Plot]]:
    """Plots by the key of the table that has their figures; `prefix` makes their names the run's own."""
    return {
        "speedup": plot_speedups(run, prefix),
        "acceptance": plot_acceptance(run, prefix),
        "drafts": plot_drafts(run, prefix),
        "time": plot_times(run, prefix),
        "bound": plot_bounds(run, prefix),
    }


def look(place: int) -> Look:
    """Of the method at this place, counted from 0."""
    return Look(COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)], LINES[place % len(LINES)])


def plot_speedups(run: Run, prefix: str) -> list[Plot]:
    """A panel per task: every method's speed-up with its interval, on one scale."""
    if not run.methods:
        return []
    tasks = dict.fromkeys((OVERALL, *run.tasks)) if OVERALL in run.tasks else run.tasks
    panels = {task: [run.summaries[method][task] for method in run.methods] for task in tasks}
    ends = [end for row in panels.values() for summary in row for end in _ends(summary)]
    low, high = min(1.0, *ends), max(1.0, *ends)
    room = 0.06 * (high - low) or 0.1

    def panel(number: int, task: str, row: Sequence[Summary]) -> Plot:
        def paint(axes: "Axes") -> None:
            axes.axvline(1, color=INK, linewidth=0.9)
            for place, summary in enumerate(row):
                _estimate(axes, place, summary)
            list_methods(axes, [summary.method for summary in row])
            axes.set_xlim(low - room, high + room)
            axes.set_title("All tasks" if task == OVERALL else task_name(task))
            axes.set_xlabel("times as fast as plain decoding")

        height = 0.95 + 0.25 * len(row)
        text = "; ".join(f"{summary.method} {summary.speedup.value:.2f}" for summary in row)
        return Plot(draw(f"{prefix}-speedup{number}", SMALL, height, paint), f"{task_name(task)}: {text}", SMALL)

    return [panel(number, *entry) for number, entry in enumerate(panels.items())]


def _ends(summary: Summary) -> list[float]:
    estimate = summary.speedup
    return [end for end in (estimate.low, estimate.value, estimate.high) if end is not None]


def _estimate(axes: "Axes", place: int, summary: Summary) -> None:
    ends, value, drawn = _ends(summary), summary.speedup.value, look(place)
    axes.plot([min(ends), max(ends)], [place, place], color=drawn.colour, linewidth=2, solid_capstyle="butt")
    axes.plot(value, place, drawn.marker, color=drawn.colour, markersize=5.5)
    _right(axes, place, f"{value:.2f}")


def _right(axes: "Axes", place: float, text: str) -> None:
    """A figure to the right of the axes."""
    axes.text(1.03, place, text, transform=axes.get_yaxis_transform(), va="center")


def list_methods(axes: "Axes", names: Sequence[str]) -> None:
    """Methods down the y axis, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def plot_acceptance(run: Run, prefix: str) -> list[Plot]:
    """CTAR(w) of every method."""
    told = [(look(place), summary) for place, summary in enumerate(run.overall()) if summary.acceptance]
    if not told:
        return []

    def paint(axes: "Axes") -> None:
        for drawn, summary in told:
            curve = summary.acceptance[:10]
            places = range(1, len(curve) + 1)
            style = {"color": drawn.colour, "linestyle": drawn.line, "marker": drawn.marker, "markersize": 5.5}
            axes.plot(places, [100 * share for share in curve], label=summary.method, linewidth=1.5, **style)
        axes.set_xlabel("w: rounds that emit more than w tokens")
        axes.set_ylabel("rounds, %")
        axes.set_ylim(0, 100)
        axes.locator_params(axis="x", integer=True)
        axes.grid()
        axes.figure.legend(loc="outside lower center", ncols=2)

    height = 3.1 + 0.2 * ((len(told) + 1) // 2)
    text = "CTAR(w) falls with w. " + "; ".join(f"{each.method} from {each.acceptance[0]:.0%}" for _, each in told)
    return [Plot(draw(f"{prefix}-acceptance", WIDE, height, paint), text, WIDE)]


def plot_drafts(run: Run, prefix: str) -> list[Plot]:
    """A panel per method, on one scale: how many tokens rounds drafted, and how many of them were accepted."""
    told = [(place, summary) for place, summary in enumerate(run.overall()) if summary.drafted]
    top = max((_most(counts) for _, summary in told for counts in (summary.drafted, summary.emitted)), default=0.0)
    return [_draft_panel(summary, look(place).colour, top, f"{prefix}-drafts{place}") for place, summary in told]


def _most(histogram: Counter[int]) -> float:
    return 100 * max(histogram.values()) / histogram.total()


def _draft_panel(summary: Summary, colour: str, top: float, name: str) -> Plot:
    def paint(axes: "Axes") -> None:
        drafted, rounds = sorted(summary.drafted), summary.rounds
        shares = [100 * summary.drafted[k] / rounds for k in drafted]
        axes.bar(drafted, shares, width=0.8, color=FAINT, edgecolor=INK, linewidth=0.6, hatch="///")
        accepted = range(max(summary.emitted))
        hits = [100 * summary.emitted[k + 1] / rounds for k in accepted]
        axes.plot(accepted, hits, color=colour, marker="o", markersize=5)
        axes.set_title(summary.method)
        axes.set_xlabel("tokens: bars drafted, dots accepted")
        axes.set_ylabel("rounds, %")
        axes.set_ylim(0, 1.05 * top)
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")

    text = f"{summary.method}: {summary.drafted_per_round:.2f} tokens drafted per round on average"
    return Plot(draw(name, SMALL, 2.1, paint), text, SMALL)


def plot_times(run: Run, prefix: str) -> list[Plot]:
    """Milliseconds per token of every method, stacked by phase; the baseline on top."""
    rows = [run.baseline, *run.overall()]

    def paint(axes: "Axes") -> None:
        start = [0.0] * len(rows)
        for phase in PHASES:
            colour, hatch = PHASE_LOOKS[phase]
            parts = [1000 * row.seconds[phase] / row.tokens for row in rows]
            bars = axes.barh(range(len(rows)), parts, 0.62, left=start, label=phase, color=colour, hatch=hatch)
            for bar in bars:
                bar.set(edgecolor=INK, linewidth=0.6)
            start = [a + b for a, b in zip(start, parts, strict=True)]
        for place, total in enumerate(start):
            axes.annotate(f"{total:.1f}", (total, place), (4, 0), textcoords="offset points", va="center")
        list_methods(axes, [method_name(row.method) for row in rows])
        axes.set_xlim(0, 1.12 * max(start))
        axes.set_xlabel("milliseconds per token")
        axes.figure.legend(loc="outside upper center", ncols=len(PHASES), columnspacing=1.2, handlelength=1.8)

    text = "; ".join(f"{method_name(row.method)} {1000 / row.tokens_per_second:.1f} ms per token" for row in rows)
    return [Plot(draw(f"{prefix}-time", WIDE, 1.1 + 0.28 * len(rows), paint), text, WIDE)]


class Reached(NamedTuple):
    """A method's measured speed-up of decoding and the bounds that are known."""

    method: str
    values: dict[str, float | None]

    @property
    def ends(self) -> list[float]:
        """What is known."""
        return [value for value in self.values.values() if value is not None]


def _reached(run: Run) -> list[Reached]:
    rows = []
    for summary in run.overall():
        limits, measured = run.bounds(summary), summary.decode_speedup
        if measured is not None and (limits.passes, limits.weights) != (None, None):
            values = {MEASURED: measured.value, PASSES: limits.passes, WEIGHTS: limits.weights}
            rows.append(Reached(summary.method, values))
    return rows


def plot_bounds(run: Run, prefix: str) -> list[Plot]:
    """Measured speed-up of decoding beside the bounds that are known."""
    if not (known := _reached(run)):
        return []

    def paint(axes: "Axes") -> None:
        axes.axvline(1, color=INK, linewidth=0.9)
        for place, row in enumerate(known):
            axes.plot([min(row.ends), max(row.ends)], [place, place], color=INK, linewidth=0.8)
        for kind, marker, fill in ((MEASURED, "o", INK), (PASSES, "D", "white"), (WEIGHTS, "^", "white")):
            points = [(value, place) for place, row in enumerate(known) if (value := row.values[kind]) is not None]
            if points:
                across, down = zip(*points, strict=True)
                axes.plot(across, down, marker, color=INK, markerfacecolor=fill, label=kind, markersize=7)
        list_methods(axes, [row.method for row in known])
        axes.set_xlabel("decoding: times as fast as plain decoding")
        axes.figure.legend(loc="outside upper center", ncols=3, columnspacing=1.2, handlelength=1.0)

    text = "; ".join(f"{row.method} {row.values[MEASURED]:.2f} of at most {max(row.ends):.2f}" for row in known)
    return [Plot(draw(f"{prefix}-bound", WIDE, 1.1 + 0.3 * len(known), paint), text, WIDE)]
