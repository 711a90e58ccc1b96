"""The command line: one file per verb, each a thin use of the library. The only place that prints."""

import sys

import typer
from transformers.utils.logging import disable_progress_bar

from kangaroo.cli.bench import bench
from kangaroo.cli.check import check
from kangaroo.cli.compare import compare
from kangaroo.cli.datastore import datastore
from kangaroo.cli.demo import demo
from kangaroo.cli.generate import generate
from kangaroo.cli.info import info
from kangaroo.cli.report import report
from kangaroo.cli.terminal import print_error
from kangaroo.cli.train import train
from kangaroo.errors import KangarooError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Faster text, the same tokens."
)
for verb in (demo, generate, train, compare, check, info, bench, report):
    app.command()(verb)
app.add_typer(datastore, name="datastore")


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2."""
    disable_progress_bar()
    try:
        app()
    except KangarooError as error:
        print_error("; ".join([str(error), *getattr(error, "__notes__", [])]))
        sys.exit(2)
