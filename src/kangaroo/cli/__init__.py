"""The command line: one file per verb, each a thin use of the library. The only place that prints."""

import sys
from importlib import import_module

import typer

from kangaroo.errors import KangarooError

VERBS = {
    "demo": "Answer held-out prompts with the demo model, with Kangaroo and without, and compare texts and speed.",
    "generate": "Generate text: one prompt, a file of prompts as a batch, or an interactive chat.",
    "train": "Train what a recipe describes: an adapter or Medusa heads for a target, or a model from scratch.",
    "compare": "Answer one prompt with every drafter: is the text the same, how fast, and where does the time go?",
    "check": "Is this drafter lossless on this model? Compares every answer with plain decoding, token by token.",
    "info": "Sizes of target and adapter, and what drafting and verifying cost here as a share of a full step.",
    "bench": "Measure methods side by side on a benchmark's questions. The same command goes on after an interruption.",
    "report": "Write report.md, report.csv and report.html: speed-ups with intervals, acceptance, time, bounds.",
    "datastore": "Text for the rest drafter to copy from.",
}
"""A verb is the function of its name in the module of its name; here is the first line of its help."""


def make_app(verb: str | None) -> typer.Typer:
    """The commands, of which only `verb` can be run: the others, and with them torch and models, are not loaded."""
    app = typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Faster text, the same tokens."
    )
    for name, summary in VERBS.items():
        if name != verb:
            app.command(name, help=summary)(_not_loaded)
            continue
        found = getattr(import_module(f"kangaroo.cli.{name}"), name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    return app


def _not_loaded() -> None:
    raise AssertionError("only the verb that the command line begins with is run")


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2."""
    verb = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in VERBS else None
    app = make_app(verb)
    if verb is not None:
        import_module("transformers.utils.logging").disable_progress_bar()
    try:
        app()
    except KangarooError as error:
        message = "; ".join([str(error), *getattr(error, "__notes__", [])])
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
