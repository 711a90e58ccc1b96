"""The command line: one file per verb, each a thin use of the library. The only place that prints."""

import sys
from typing import Annotated

import typer
from transformers.utils.logging import disable_progress_bar

from kangaroo.cli.bench import bench
from kangaroo.cli.check import check
from kangaroo.cli.compare import compare
from kangaroo.cli.datastore import datastore
from kangaroo.cli.demo import demo
from kangaroo.cli.generate import generate
from kangaroo.cli.info import info
from kangaroo.cli.output import checked_output
from kangaroo.cli.report import report
from kangaroo.cli.terminal import out, print_error
from kangaroo.cli.train import train
from kangaroo.errors import KangarooError
from kangaroo.machine import versions

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Faster text, the same tokens."
)
for verb in (demo, generate, train, compare, check, info, bench, report):
    app.command()(verb)
app.add_typer(datastore, name="datastore")


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"kangaroo {versions()['kangaroo-decoding']}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Which.")] = False,
) -> None:
    """Faster text, the same tokens."""


MISUSE: type[Exception] = typer.BadParameter.__mro__[1]  # a wrong option or value, which typer gives no name
STOPPED = 130


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2."""
    disable_progress_bar()
    try:
        with checked_output():
            sys.exit(_run())
    except KangarooError as error:
        print_error("; ".join([str(error), *getattr(error, "__notes__", [])]))
        sys.exit(2)


def _run() -> int:
    try:
        done = app(standalone_mode=False)
        return done if isinstance(done, int) else 0
    except MISUSE as error:
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":  # the help has been shown
            return 2
        hint = f"; see {context.command_path} --help" if context is not None else ""
        print_error(error.format_message().rstrip(".") + hint)  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return STOPPED
