"""`kangaroo export`: an adapter as a draft for engines that other people run."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kangaroo.cli.options import Json
from kangaroo.cli.terminal import notes, out, print_json
from kangaroo.exchange.export import Exported
from kangaroo.exchange.export import export as write
from kangaroo.exchange.launch import ENGINES
from kangaroo.loading import DTYPES


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder written by `kangaroo train`.")],
    engine: Annotated[str, typer.Option("--for", help=f"{', '.join(ENGINES)}.")],
    output: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    model: Annotated[
        str, typer.Option(help="Its target: 'demo', a local folder, a GGUF file, or a hub name.")
    ] = "demo",
    dtype: Annotated[str | None, typer.Option(help=f"The draft's: {', '.join(DTYPES)}. Default: the target's.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the target is loaded: cpu, cuda.")] = None,
    allow_other_target: Annotated[
        bool, typer.Option("--allow-other-target", help="Take an adapter trained for a relative of the model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as a draft for other engines, proven equal, and print the line that starts it there."""
    with notes.status("exporting"):
        done = write(
            adapter, engine, output, model=model, dtype=dtype, device=device, allow_other_target=allow_other_target
        )
    if as_json:
        facts = asdict(done)
        print_json(facts | {"folder": str(done.folder)})
    else:
        _show(done)


def _show(done: Exported) -> None:
    size = f"{done.layers} layers, " if done.layers else ""
    out.print(Text(f"{done.folder}: {size}{done.parameters:,} weights, {done.dtype}"))
    if done.proof is not None:
        out.print(Text(f"Loaded from there, {done.proof.in_words()}."))
    out.print(Text(f"\n{done.launch.text}\n"))
    for note in done.launch.notes:
        out.print(Text(f"- {note.replace('**', '')}"))
