"""The report of one or more runs: Markdown, and a page that needs nothing but itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kangaroo.bench.report.experiment import Experiment
from kangaroo.bench.report.experiment_plot import experiment_plot, experiment_table
from kangaroo.bench.report.plots import Plot, make_plots
from kangaroo.bench.report.projection.table import beside_published, projected_speedups
from kangaroo.bench.report.results import Run
from kangaroo.bench.report.tables import Table, make_tables, to_markdown
from kangaroo.bench.report.words import facts, lead

TITLE = "Speculative decoding, measured"
INTRODUCTION = (
    "Speculative decoding drafts tokens cheaply and has the model check several of them in one pass. Here every method "
    "answers the same questions as plain decoding, in turn with it, on the same weights and the same machine."
)
WARNING = "Not everything here can be compared: {}."


@dataclass(frozen=True, slots=True)
class Part:
    """A table with the plots that show it."""

    table: Table
    plots: list[Plot]


@dataclass(frozen=True, slots=True)
class Chapter:
    """One run, or one experiment."""

    name: str
    lead: str
    parts: list[Part]
    facts: list[tuple[str, str]]


def to_page(runs: Sequence[Run], mixture: str | None, experiments: Sequence[Experiment] = ()) -> str:
    """One HTML document, experiments first; `mixture` says how runs differ that should not (`find_mixture`).

    Raises ConfigError if matplotlib is not installed.
    """
    sections = [_about(experiment, f"experiment{place}") for place, experiment in enumerate(experiments, 1)]
    sections += [_section(run, f"run{place}") for place, run in enumerate(runs, 1)]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    page: Any = environment.get_template("page.html.j2")
    return str(
        page.render(
            title=TITLE,
            introduction=INTRODUCTION,
            warning=WARNING.format(mixture) if mixture else "",
            sections=sections,
        )
    )


def _about(experiment: Experiment, prefix: str) -> Chapter:
    first, *others = _experiment_tables(experiment)
    parts = [Part(first, [experiment_plot(experiment, prefix)]), *(Part(table, []) for table in others)]
    return Chapter(experiment.about.title, experiment.about.note, parts, [])


def _experiment_tables(experiment: Experiment) -> list[Table]:
    trace = experiment.trace
    projections = [] if trace is None else [projected_speedups(trace), beside_published(trace)]
    return [experiment_table(experiment), *projections]


def _section(run: Run, prefix: str) -> Chapter:
    plots = make_plots(run, prefix)
    parts = [Part(table, plots.get(table.key, [])) for table in make_tables(run)]
    return Chapter(run.name, lead(run), parts, facts(run.provenance))


def to_document(runs: Sequence[Run], mixture: str | None, experiments: Sequence[Experiment] = ()) -> str:
    """The same without plots, in Markdown."""
    blocks = [f"# {TITLE}\n\n{INTRODUCTION}\n", *([f"**{WARNING.format(mixture)}**\n"] if mixture else [])]
    for experiment in experiments:
        blocks += [
            f"## {experiment.about.title}\n\n{experiment.about.note}\n",
            to_markdown(_experiment_tables(experiment)),
        ]
    for run in runs:
        lines = "".join(f"- {name}: {text}\n" for name, text in facts(run.provenance))
        blocks += [f"## {run.name}\n\n{lead(run)}\n", to_markdown(make_tables(run)), f"### Provenance\n\n{lines}"]
    return "\n".join(blocks)
