"""`kangaroo train`: what a recipe describes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kangaroo.cli.options import Threads, set_threads
from kangaroo.cli.terminal import notes, out, training_progress
from kangaroo.errors import ConfigError
from kangaroo.training import ranks
from kangaroo.training.loop import Interrupted
from kangaroo.training.quick import RECIPE, train_quickly
from kangaroo.training.report import TrainingReport
from kangaroo.training.run import train as train_recipe


def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, such as my-adapter.toml.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="Chat JSONL(.gz), Parquet or text; may be repeated. Not for recipes with \\[synthesis]."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of a recipe: 'demo', a folder or a hub name to train an adapter for.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long to train, with --model.")] = 60,
    output: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    threads: Threads = None,
) -> None:
    """Train what a recipe describes: an adapter or Medusa heads for a target, or a model from scratch.

    Without a recipe, --model and --data train an adapter in --minutes, with settings that suit the model.
    """
    set_threads(threads)
    if (recipe is None) == (model is None):
        raise ConfigError("name a recipe, or a model to train an adapter for (--model)")
    if model is not None and max_steps is not None:
        raise ConfigError("--max-steps belongs to a recipe; with --model, --minutes says how long to train")
    overrides: dict[str, Any] = {} if output is None else {"output": str(output)}
    if max_steps is not None:
        overrides["schedule.steps"] = max_steps
    try:
        with training_progress() as report:
            if recipe is not None:
                folder = train_recipe(recipe, data or (), overrides=overrides, resume=resume, report=report)
            else:
                assert model is not None
                folder = _without_recipe(model, data or (), report, minutes, output, resume)
    except Interrupted as stop:
        notes.print(str(stop))
        raise typer.Exit(130) from None
    if ranks.is_first():
        out.print(f"best weights: {folder}")


def _without_recipe(
    model: str, data: Sequence[Path], report: TrainingReport, minutes: float, output: Path | None, resume: bool
) -> Path:
    output = output or Path("runs") / f"{Path(model).name}-adapter"
    if resume:
        return train_recipe(output / RECIPE, data, resume=True, report=report)
    return train_quickly(model, data, report, minutes=minutes, output=output, settings={})
