"""The command line: one file per verb, each a thin use of the library. The only place that prints."""

import keyword
import sys
import tempfile
from importlib import import_module
from typing import Annotated

import typer

from kangaroo.cli.output import checked_output, print_error
from kangaroo.errors import ConfigError, KangarooError

VERBS = {
    "demo": "Answer held-out prompts with the demo model, with Kangaroo and without, and compare texts and speed.",
    "generate": "Generate text: one prompt, a file of prompts as a batch, or an interactive chat.",
    "train": "Train what a recipe describes: an adapter or Medusa heads for a target, or a model from scratch.",
    "compare": "Answer one prompt with every drafter: is the text the same, how fast, and where does the time go?",
    "check": "Is this drafter lossless on this model? Compares every answer with plain decoding, token by token.",
    "info": "Sizes of target and adapter, and what drafting and verifying cost here as a share of a full step.",
    "bench": "Measure methods side by side on a benchmark's questions. The same command goes on after an interruption.",
    "report": "Write report.md, report.csv and report.html: speed-ups with intervals, acceptance, time, bounds.",
    "serve": "Answer requests of OpenAI's clients: chat, completions, streams. Ctrl-C ends it in good order.",
    "loadtest": "Ask a running server much at once, with speculation and without: speed, and are texts the same?",
    "import": "Make usable here what others trained: a Kangaroo adapter, an EAGLE-3 head, a model for early exit.",
    "export": "Write an adapter as a draft for other engines, proven equal, and print the line that starts it there.",
    "datastore": "Text for the rest drafter to copy from.",
}
"""A verb is the function of its name in the module of its name, which Python's own words have an underscore after; here
is the first line of its help."""


def make_app(verb: str | None) -> typer.Typer:
    """The commands, of which only `verb` can be run: the others, and with them torch and models, are not loaded."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_about)
    for name, summary in VERBS.items():
        if name != verb:
            app.command(name, help=summary)(_not_loaded)
            continue
        own = f"{name}_" if keyword.iskeyword(name) else name
        found = getattr(import_module(f"kangaroo.cli.{own}"), own)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def _not_loaded() -> None:
    raise AssertionError("only the verb that the command line begins with is run")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kangaroo {import_module('kangaroo').__version__}")
        raise typer.Exit


def _about(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Which.")] = False,
) -> None:
    """Faster text, the same tokens."""


MISUSE: type[Exception] = typer.BadParameter.__mro__[1]  # a wrong option or value, which typer gives no name
STOPPED = 130


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    try:
        if verb in VERBS:
            _need_temporary_folder()
            import_module("transformers.utils.logging").disable_progress_bar()
        app = make_app(verb)
        with checked_output():
            status = _run(app)
    except KangarooError as error:
        print_error("; ".join([str(error), *getattr(error, "__notes__", [])]))
        status = 2
    sys.exit(status)


def _need_temporary_folder() -> None:
    """Raise ConfigError unless there is one: torch does not even load without."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError("no folder for temporary files can be written to: make room, or name one in TMPDIR") from None


def _run(app: typer.Typer) -> int:
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
