"""`kangaroo train`: what a recipe describes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kangaroo.cli.options import Threads, set_threads
from kangaroo.cli.terminal import notes, out, training_progress
from kangaroo.training.loop import Interrupted
from kangaroo.training.run import train as train_recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo-adapter.toml.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="Chat JSONL(.gz), Parquet or text; may be repeated. Not for recipes with \\[synthesis]."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    threads: Threads = None,
) -> None:
    """Train what a recipe describes: an adapter or Medusa heads for a target, or a model from scratch."""
    set_threads(threads)
    overrides: dict[str, Any] = {} if output is None else {"output": str(output)}
    if max_steps is not None:
        overrides["schedule.steps"] = max_steps
    try:
        with training_progress() as report:
            folder = train_recipe(recipe, data or (), overrides=overrides, resume=resume, report=report)
    except Interrupted as stop:
        notes.print(str(stop))
        raise typer.Exit(130) from None
    out.print(f"best weights: {folder}")
