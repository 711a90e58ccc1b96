"""`kangaroo report`: the tables and the page of benchmark runs."""

from pathlib import Path
from typing import Annotated

import typer

from kangaroo.bench.report.export import to_csv
from kangaroo.bench.report.folders import read_folders
from kangaroo.bench.report.page import to_document, to_page
from kangaroo.bench.report.results import find_mixture
from kangaroo.cli.terminal import out
from kangaroo.errors import ConfigError, DataError
from kangaroo.files import write_text


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders written by `kangaroo bench`.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the report; that of the run if there is one.")] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Allow runs of different machines, commits or versions.")
    ] = False,
    legacy: Annotated[
        bool, typer.Option("--legacy", help="Add Spec-Bench's own count; needs the model's tokenizer.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="Compare all methods with this one too, question by question.")
    ] = None,
) -> None:
    """Write report.md, report.csv and report.html: speed-ups with intervals, acceptance, time, bounds."""
    if output is None and len(folders) > 1:
        raise ConfigError(f"{len(folders)} runs make one report: say with --output which folder it belongs in")
    found = read_folders(folders, count=legacy, against=against)
    runs, experiments = found.runs, found.experiments
    mixture = find_mixture(runs)
    if mixture and not mixed:
        raise DataError(f"{mixture}; report them apart, or together with --mixed")
    # All three are made before any is written: an error leaves the old report whole.
    texts = {
        "report.md": to_document(runs, mixture, experiments),
        "report.csv": to_csv(runs),
        "report.html": to_page(runs, mixture, experiments),
    }
    for name, text in texts.items():
        path = (output or folders[0]) / name
        write_text(path, text)
        out.print(str(path))
