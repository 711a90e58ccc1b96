"""`kangaroo bench`: what a benchmark recipe describes, measured."""

from pathlib import Path
from typing import Annotated

import typer

from kangaroo.bench.recipe import read_bench_recipe
from kangaroo.bench.run import run_bench
from kangaroo.terminal import countdown, out


def bench(
    recipe: Annotated[Path, typer.Argument(help="A benchmark recipe, such as recipes/spec-bench.toml.")],
    questions: Annotated[
        str | None, typer.Option(help="A file or an http(s) address, instead of the recipe's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions, evenly from all tasks.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the recipe's.")] = None,
) -> None:
    """Measure methods side by side on a benchmark's questions. The same command goes on after an interruption."""
    given = {"questions": questions, "output": None if output is None else str(output)}
    settings = read_bench_recipe(recipe, {key: value for key, value in given.items() if value is not None})
    with countdown("questions answered by all methods") as report:
        records = run_bench(settings, limit=limit, report=report)
    found = [(r.method, turn.difference) for r in records for turn in r.turns if turn.difference is not None]
    ties = sum(difference.tie for _, difference in found)
    verdict = (
        f"{len(found)} differ from plain decoding's, {ties} of them by a tie in rounding; kangaroo report has them"
    )
    out.print(f"{len(records)} answers, {verdict if found else 'all of them those of plain decoding, token for token'}")
    out.print(f"records: {settings.output}; tables and plots: kangaroo report {settings.output}")
    peers = {method.name for method in settings.methods if method.kind == "transformers"}
    if any(name not in peers and not difference.tie for name, difference in found):
        raise typer.Exit(1)
