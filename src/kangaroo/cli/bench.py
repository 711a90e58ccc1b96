"""`kangaroo bench`: what a benchmark recipe describes, measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kangaroo.bench.recipe import BenchRecipe, read_bench_recipe
from kangaroo.bench.records import Record
from kangaroo.bench.run import run_bench, run_sweep
from kangaroo.bench.trained import Training, train_methods
from kangaroo.checks import counted
from kangaroo.cli.options import Compile, Threads
from kangaroo.cli.terminal import countdown, notes, out, training_progress
from kangaroo.training.loop import Interrupted
from kangaroo.training.recipe import read_recipe
from kangaroo.training.run import train_beside


def bench(
    recipe: Annotated[Path, typer.Argument(help="A benchmark recipe, such as recipes/spec-bench.toml.")],
    questions: Annotated[
        str | None, typer.Option(help="A file or an http(s) address, instead of the recipe's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions, evenly from all tasks.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="What methods are trained on, instead of the recipe's.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="In minutes, by the recipe's \\[quick] section.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the recipe's.")] = None,
    threads: Threads = None,
    compiled: Compile = False,
) -> None:
    """Measure methods side by side on a benchmark's questions. The same command goes on after an interruption.

    Methods that the recipe wants trained are trained first.
    """
    given: dict[str, Any] = {"questions": questions, "output": None if output is None else str(output)}
    given |= {"threads": threads, "compile": compiled or None}
    given["training.data"] = [str(path.resolve()) for path in data] if data else None
    changes = {key: value for key, value in given.items() if value is not None}
    settings, lacking = read_bench_recipe(recipe, changes, quick=quick).without_missing()
    for name, reason in lacking.items():
        notes.print(f"left out: {name} ({reason})", style="dim")
    trained = train_methods(settings, recipe.parent, _train, lambda each: read_recipe(each.recipe, each.changes))
    if settings.vary is None:
        with countdown("questions answered by all methods") as report:
            records = run_bench(settings, trained=trained, limit=limit, report=report)
    else:
        runs = run_sweep(settings, trained=trained, limit=limit, watch=countdown)
        records = [record for run in runs.values() for record in run]
    _conclude(settings, records)


def _train(training: Training) -> Path:
    out.print(f"training {training.folder} by {training.recipe}")
    with _going_on(), training_progress() as report:
        return train_beside(training.recipe, training.data, training.beside, overrides=training.changes, report=report)


@contextmanager
def _going_on() -> Iterator[None]:
    try:
        yield
    except Interrupted as stop:
        notes.print(f"stopped after step {stop.step}; the state is saved in {stop.folder}, the same command goes on")
        raise typer.Exit(130) from None


def _conclude(settings: BenchRecipe, records: Sequence[Record]) -> None:
    found = [(r.method, turn.difference) for r in records for turn in r.turns if turn.difference is not None]
    ties = sum(difference.tie for _, difference in found)
    drawn = settings.drawn
    compared = sum(record.method not in drawn for record in records)
    verdict = (
        f"{len(found)} differ from plain decoding's, {ties} of them by a tie in rounding; kangaroo report has them"
    )
    same = "all of them those of plain decoding, token for token"
    out.print(f"{counted(compared, 'answer')}, {verdict if found else same}")
    if drawn:
        others = counted(len(records) - compared, "answer")
        out.print(f"{others} with texts of their own, by rejection: {', '.join(sorted(drawn))}")
    levels = sorted({record.exactness for record in records if record.exactness})
    if levels:
        out.print(f"exactness: {', '.join(levels)}")
    out.print(f"records: {settings.output}; tables and plots: kangaroo report {settings.output}")
    peers = {method.name for method in settings.methods if method.kind == "transformers"}
    if any(name not in peers and not difference.tie for name, difference in found):
        raise typer.Exit(1)
