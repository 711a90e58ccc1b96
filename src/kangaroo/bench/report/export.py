"""Every figure of a run as CSV: one per row, with its interval where it has one, unrounded."""

import csv
import io
from collections.abc import Iterator, Sequence

from kangaroo.bench.report.results import Run
from kangaroo.bench.report.statistics import Estimate, Summary

HEADER = ("run", "method", "task", "figure", "value", "low", "high")
Row = tuple[str, Estimate]


def to_csv(runs: Sequence[Run]) -> str:
    """Rows of HEADER; a figure that is unknown has none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for run in runs:
        for method, by_task in run.summaries.items():
            for task, summary in by_task.items():
                for name, found in _figures(run, summary):
                    limits = ("" if limit is None else limit for limit in (found.low, found.high))
                    writer.writerow((run.name, method, task, name, found.value, *limits))
    return text.getvalue()


def _figures(run: Run, summary: Summary) -> Iterator[Row]:
    limits = run.bounds(summary)
    single = {
        "tokens_per_second": summary.tokens_per_second,
        "compression_rate": summary.compression_rate,
        "drafted_per_round": summary.drafted_per_round,
        "accepted_share": summary.accepted_share,
        "bound_weights": limits.weights,
        "bound_passes": limits.passes,
        "questions": summary.questions,
        "answers": summary.answers,
        "identical_answers": summary.identical,
        "ties": summary.ties,
        "tokens": summary.tokens,
        "rounds": summary.rounds or None,
        "dropped_tokens": summary.dropped_tokens,
        "peak_bytes": summary.peak_bytes,
    }
    yield "speedup", summary.speedup
    if summary.decode_speedup is not None:
        yield "decode_speedup", summary.decode_speedup
    yield from ((name, Estimate(value)) for name, value in single.items() if value is not None)
    yield from ((f"ctar_{w}", Estimate(share)) for w, share in enumerate(summary.acceptance, 1))
    yield from ((f"seconds_{phase}", Estimate(seconds)) for phase, seconds in summary.seconds.items())
    yield from ((f"rounds_drafting_{k}", Estimate(count)) for k, count in sorted(summary.drafted.items()))
    yield from ((f"rounds_emitting_{k}", Estimate(count)) for k, count in sorted(summary.emitted.items()))
    yield from ((f"rounds_stopped_by_{reason}", Estimate(count)) for reason, count in sorted(summary.stops.items()))
    if counts := run.counts.get(summary.method):
        both = counts[summary.task]
        yield "speedup_legacy_count", Estimate(both.legacy.speedup)
        yield "speedup_corrected_count", Estimate(both.corrected.speedup)
