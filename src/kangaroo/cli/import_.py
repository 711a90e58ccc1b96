"""`kangaroo import`: drafters that others trained."""

from pathlib import Path
from typing import Annotated

import typer

from kangaroo.checks import shown
from kangaroo.cli.options import Threads, set_threads
from kangaroo.cli.terminal import notes, out
from kangaroo.decoder import Decoder, load
from kangaroo.errors import ConfigError
from kangaroo.exchange.importing import Wanted, import_folder
from kangaroo.loading import DTYPES


def import_(
    folder: Annotated[
        Path, typer.Argument(help="An adapter of the Kangaroo release, an EAGLE-3 head, or a LayerSkip model.")
    ],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    target: Annotated[str | None, typer.Option(help="The model it drafts for: a folder or hub name.")] = None,
    exit_layer: Annotated[
        int | None, typer.Option(help="Of an adapter or a model. Published: 2 for 7B, 3 for 13B; LayerSkip 7B: 8.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Text to calibrate confidences on; may be repeated.")
    ] = None,
    taps: Annotated[
        str | None, typer.Option(help="Of an EAGLE-3 head: after how many layers it reads, as in 2,16,29.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    threads: Threads = None,
) -> None:
    """Make usable here what others trained: a Kangaroo adapter, an EAGLE-3 head, a model for early exit."""
    set_threads(threads)
    wanted = Wanted(
        folder=folder, output=output, target=target, exit_layer=exit_layer, taps=_parse_taps(taps), data=data or ()
    )

    def load_target(name: str) -> Decoder:
        return load(name, drafter="none", dtype=dtype, device=device, exact=False, pack=False)

    with notes.status("importing") as status:
        made = import_folder(wanted, load_target, lambda done, total: status.update(f"answers {done}/{total}"))
    out.print(f"{output}: {made.kind}; use it with {made.use}", soft_wrap=True)
    for note in made.notes:
        notes.print(note, soft_wrap=True)


def _parse_taps(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise ConfigError(f"--taps takes three numbers of layers, as in 2,16,29, got {shown(text)}")
    low, middle, high = map(int, parts)
    return low, middle, high
