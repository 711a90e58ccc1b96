"""A run as tables: the same ones in Markdown and on the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kangaroo.bench.published import PAPER, SOURCE, TASKS
from kangaroo.bench.records import BASELINE
from kangaroo.bench.report.grid import FirstDifference
from kangaroo.bench.report.results import Run
from kangaroo.bench.report.statistics import PHASES, Estimate, Summary, relative_speeds
from kangaroo.machine import human_bytes

UNKNOWN = "–"
SHOWN_DIFFERENCES = 20


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first column names the row."""

    key: str
    title: str
    note: str
    """What the figures mean."""
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def make_tables(run: Run) -> list[Table]:
    """All tables of a run; those that would be empty are left out."""
    makers = (overview, speedups, relative, compression, acceptance, drafts, times, bound, counts, paper, differences)
    return [table for make in makers if (table := make(run)).rows]


def task_name(task: str) -> str:
    """A task as it is shown."""
    return TASKS.get(task, task.replace("_", " "))


def method_name(method: str) -> str:
    """A method as it is shown."""
    return "plain decoding" if method == BASELINE else method


def overview(run: Run) -> Table:
    """Every method on all questions."""

    def row(summary: Summary) -> tuple[str, ...]:
        return (
            method_name(summary.method),
            UNKNOWN if summary.method == BASELINE else span(summary.speedup),
            f"{summary.tokens_per_second:.1f}",
            number(summary.compression_rate),
            number(summary.drafted_per_round),
            percent(summary.accepted_share),
            UNKNOWN if summary.method in run.drawn else f"{summary.identical} of {summary.answers}",
            UNKNOWN if summary.peak_bytes is None else human_bytes(summary.peak_bytes),
        )

    return Table(
        "overview",
        "All questions",
        "Speed-up: seconds per token of plain decoding over the method's, totals over all questions and repeats, "
        "prefill included; in brackets the 95 % interval, by bootstrap over questions. CR: tokens per round. Accepted: "
        "share of the drafted tokens. Identical: answers that are plain decoding's, token by token.",
        ("method", "speed-up", "tokens/s", "CR", "drafted per round", "accepted", "identical", "peak memory"),
        [row(summary) for summary in (run.baseline, *run.overall())],
    )


def speedups(run: Run) -> Table:
    """By method and task."""
    note = (
        "With 95 % intervals over the questions of the task. From few questions they come out too narrow; one has none."
    )
    return _by_task(run, "speedup", "Speed-up", note, lambda summary: span(summary.speedup))


def relative(run: Run) -> Table:
    """By method and task, in units of the method that was asked for; else no rows."""
    if run.against is None:
        return Table("relative", "", "", (), [])
    speeds = relative_speeds(run.grid, run.against)
    rows = [
        (method_name(method), *(span(speeds[method][task]) for task in run.tasks))
        for method in run.grid.methods
        if method != run.against
    ]
    note = (
        f"Seconds per token of {method_name(run.against)} over the method's, with 95 % intervals over questions: both "
        "methods answered each of them in turn, so that what they have in common cancels out."
    )
    title = f"Beside {method_name(run.against)}"
    return Table("relative", title, note, ("method", *map(task_name, run.tasks)), rows)


def compression(run: Run) -> Table:
    """By method and task."""
    note = "CR: mean tokens per round, the target's own one included."
    return _by_task(run, "compression", "Compression rate", note, lambda summary: number(summary.compression_rate))


def _by_task(run: Run, key: str, title: str, note: str, cell: Callable[[Summary], str]) -> Table:
    rows = [(method, *(cell(run.summaries[method][task]) for task in run.tasks)) for method in run.methods]
    return Table(key, title, note, ("method", *map(task_name, run.tasks)), rows)


def acceptance(run: Run) -> Table:
    """CTAR(w) of every method on all questions."""
    curves = {summary.method: summary.acceptance for summary in run.overall() if summary.rounds}
    longest = min(10, max(map(len, curves.values()), default=0))
    rows = [
        (method, *(percent(share) for share in curve[:longest]), *[percent(0.0)] * (longest - len(curve)))
        for method, curve in curves.items()
    ]
    note = "CTAR(w): the share of rounds that emitted more than w tokens; CR is 1 plus their sum."
    return Table("acceptance", "Acceptance", note, ("method", *(f"w = {w}" for w in range(1, longest + 1))), rows)


def drafts(run: Run) -> Table:
    """Why drafting stopped."""
    told = [summary for summary in run.overall() if summary.stops]
    reasons = sorted({reason for summary in told for reason in summary.stops})
    rows = [
        (
            summary.method,
            f"{summary.rounds:,}",
            number(summary.drafted_per_round),
            *(percent(summary.stops[reason] / summary.rounds) for reason in reasons),
        )
        for summary in told
    ]
    note = (
        "Share of rounds in which drafting stopped because the last token was unsure (confidence), as many tokens were "
        "drafted as allowed (length), the answer had no more room (room), or there was nothing to propose (nothing)."
    )
    return Table("drafts", "Drafts", note, ("method", "rounds", "drafted per round", *reasons), rows)


def times(run: Run) -> Table:
    """Milliseconds per emitted token, by phase."""
    rows = []
    for summary in (run.baseline, *run.overall()):
        parts = [1000 * summary.seconds[phase] / summary.tokens for phase in PHASES]
        rows.append((method_name(summary.method), *(f"{part:.2f}" for part in parts), f"{sum(parts):.2f}"))
    note = (
        "Milliseconds per emitted token: the prompt, drafting, the target's pass over drafts, the rest of a round. "
        "What a method does not tell apart is in the rest."
    )
    return Table("time", "Where the time goes", note, ("method", *PHASES, "in all"), rows)


def bound(run: Run) -> Table:
    """Measured speed-up of decoding against what the same rounds could have had; unknown columns are left out."""
    found = [(summary, run.bounds(summary)) for summary in run.overall() if summary.decode_speedup is not None]
    kinds = [kind for kind in ("passes", "weights") if any(getattr(limits, kind) is not None for _, limits in found)]
    rows = []
    for summary, limits in found:
        values = [getattr(limits, kind) for kind in kinds]
        if summary.decode_speedup is not None and any(value is not None for value in values):
            got = summary.decode_speedup
            shares = [percent(None if value is None else got.value / value) for value in values]
            cells = [cell for pair in zip(map(number, values), shares, strict=True) for cell in pair]
            rows.append((summary.method, span(got), *cells))
    note = (
        "Speed-up of decoding alone, without prefill, beside what the same rounds could have had. Bound by passes: the "
        "pieces of a round, each timed alone on this machine, and nothing else. Bound by weights: a pass takes as long "
        "as reading its weights."
    )
    header = [cell for kind in kinds for cell in (f"bound: {kind}", "reached")]
    return Table("bound", "How fast it could have been", note, ("method", "measured", *header), rows)


def counts(run: Run) -> Table:
    """Legacy and corrected speed-ups by task."""
    rows = [
        (f"{method}, {kind}", *(f"{getattr(found[task], kind).speedup:.2f}" for task in run.tasks if task in found))
        for method, found in run.counts.items()
        for kind in ("legacy", "corrected")
    ]
    note = (
        "Speed-ups from the answer files. Legacy: as Spec-Bench's own script counts, a ratio of mean speeds with the "
        "baseline's text tokenised again; published tables hold it. Corrected: emitted tokens over time, totals."
    )
    return Table("counts", "Two ways of counting", note, ("method, count", *map(task_name, run.tasks)), rows)


def paper(run: Run) -> Table:
    """The paper's table with ours below it, where all of Spec-Bench's tasks were run; else no rows."""
    if not set(TASKS) <= set(run.grid.tasks):
        return Table("paper", "", "", (), [])
    rows = [
        (
            f"{row.method}, {row.size} (paper)",
            *(f"{cr:.2f} / {up:.2f}" for cr, up in zip(row.compression_rates, row.speedups, strict=True)),
            f"{row.average:.2f}",
        )
        for row in PAPER
    ]
    for method in run.methods:
        found = [run.summaries[method][task] for task in TASKS]
        cells = (f"{number(summary.compression_rate)} / {summary.speedup.value:.2f}" for summary in found)
        mean = sum(summary.speedup.value for summary in found) / len(found)
        rows.append((f"{method} (this run)", *cells, f"{mean:.2f}"))
    note = (
        f"CR / speed-up, and the mean of the six speed-ups. The paper's figures: {SOURCE}. They are of other models on "
        "other machines: what can be compared is which tasks are easy, and how speed-up follows from CR."
    )
    return Table("paper", "Beside the paper", note, ("method", *TASKS.values(), "mean"), rows)


def differences(run: Run) -> Table:
    """The first answers that are not the baseline's."""
    compared = [summary for summary in run.overall() if summary.method not in run.drawn]
    found = [difference for summary in compared for difference in summary.differences]
    rows = [_difference(difference) for difference in found[:SHOWN_DIFFERENCES]]
    more = f" The first {SHOWN_DIFFERENCES} of {len(found)}." if len(found) > SHOWN_DIFFERENCES else ""
    note = f"Where answers first depart from plain decoding's, counted from 0. A tie: rounding explains the gap.{more}"
    header = ("method", "task", "question", "repeat", "turn", "token", "gap", "tie")
    return Table("differences", "Answers that differ", note, header, rows)


def _difference(found: FirstDifference) -> tuple[str, ...]:
    gap = UNKNOWN if found.gap is None else f"{found.gap:.2g}"
    places = (found.question, found.repeat, found.turn, found.position)
    return found.method, task_name(found.task), *map(str, places), gap, "yes" if found.tie else "no"


def span(estimate: Estimate) -> str:
    """An estimate with its interval."""
    interval = "" if estimate.low is None else f" ({estimate.low:.2f}–{estimate.high:.2f})"
    return f"{estimate.value:.2f}{interval}"


def number(value: float | None) -> str:
    """A figure that may be unknown."""
    return UNKNOWN if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share that may be unknown."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def to_markdown(tables: Sequence[Table]) -> str:
    """Tables under headings of the third level."""
    blocks = []
    for table in tables:
        lines = [_line(table.header), _line(("---", *["---:"] * (len(table.header) - 1))), *map(_line, table.rows)]
        blocks.append(f"### {table.title}\n\n{table.note}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(blocks)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
