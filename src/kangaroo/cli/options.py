"""Options that verbs share, and the Decoder they describe."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

from kangaroo.cli.terminal import notes
from kangaroo.decoder import Decoder, load
from kangaroo.drafters import DRAFTERS, find_drafter
from kangaroo.errors import ConfigError
from kangaroo.loading import DTYPES
from kangaroo.machine import MOST_THREADS

Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: by a short trial.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile kernels for this CPU; needs a C++ compiler.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
MaxTokens = Annotated[int, typer.Option(help="New tokens at most.")]
Drafter = Annotated[str, typer.Option(help=f"{', '.join(DRAFTERS)}.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, what drafts for it, and how it is run."""

    model: Annotated[str, typer.Option(help="'demo', a local folder, a GGUF file, or a hub name.")] = "demo"
    adapter: Annotated[Path | None, typer.Option(help="kangaroo: folder written by `kangaroo train`.")] = None
    heads: Annotated[Path | None, typer.Option(help="medusa: folder written by `kangaroo train`.")] = None
    eagle3: Annotated[Path | None, typer.Option(help="eagle3: folder written by `kangaroo import`.")] = None
    draft_model: Annotated[str | None, typer.Option(help="draft-model: a folder or hub name.")] = None
    datastore: Annotated[Path | None, typer.Option(help="rest: file written by `kangaroo datastore build`.")] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A drafter's setting; may be repeated.")
    ] = None
    allow_other_target: Annotated[
        bool, typer.Option("--allow-other-target", help="Let weights trained for a relative of the model draft for it.")
    ] = False
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU if there is one.")] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model on the hub.")
    ] = False
    threads: Threads = None
    compile: Compile = False
    exact: Annotated[bool, typer.Option(help="The same bits with drafts and without, where this machine can.")] = True

    def open(self, drafter: str) -> Decoder:
        """The Decoder; settings that are not given keep the drafter's defaults."""
        set_threads(self.threads)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        settings = self.parsed_settings
        find_drafter(drafter)  # a wrong name should not wait for the model to load
        with notes.status("loading the model; the first time, trying how to compute it exactly"):
            plain = load(
                self.model,
                drafter="none",
                device=self.device,
                dtype=self.dtype,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                allow_other_target=self.allow_other_target,
                exact=self.exact,
                compile=self.compile,
                threads="auto" if self.threads is None else None,
                **self.files,
            )
        return plain if drafter == "none" and not settings else plain.with_drafter(drafter, **settings)

    def open_all(self) -> tuple[dict[str, Decoder], dict[str, str]]:
        """A Decoder per drafter, on one target; and the drafters that lack what they draft with, with the reason."""
        if self.settings:
            raise ConfigError("--set belongs to one drafter; leave it out when all of them run")
        plain, opened, left_out = self.open("none"), dict[str, Decoder](), dict[str, str]()
        for name, entry in DRAFTERS.items():
            if entry.files is not None and entry.files not in plain.files:
                left_out[name] = f"needs --{entry.files.replace('_', '-')}"
            elif name != "none":
                opened[name] = plain.with_drafter(name)
        return opened, left_out

    @property
    def files(self) -> dict[str, Any]:
        """What was given for drafters to load, by the names of their settings."""
        given = {"adapter": self.adapter, "heads": self.heads, "draft_model": self.draft_model}
        given |= {"eagle3": self.eagle3, "datastore": self.datastore}
        return {name: path for name, path in given.items() if path is not None}

    @property
    def parsed_settings(self) -> dict[str, Any]:
        """The NAME=VALUE pairs, numbers as numbers, true and false as such."""
        pairs = [text.partition("=") for text in self.settings or ()]
        for name, equals, value in pairs:
            if not name or not equals or not value:
                raise ConfigError(f"--set takes NAME=VALUE, got {name + equals + value!r}")
        return {name: _value(text) for name, _, text in pairs}


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def set_threads(threads: int | None) -> None:
    """Use so many CPU threads; None leaves it to torch."""
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise ConfigError(f"--threads must be in 1..{MOST_THREADS}, got {threads}")
        torch.set_num_threads(threads)


def with_model_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Spread the ModelOptions that a verb takes as its first argument out into command-line options."""
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    hints, keyword = get_type_hints(ModelOptions, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(ModelOptions)
    ]
    parameters = [*(p.replace(kind=keyword) for p in own), *shared]

    def spread(**options: Any) -> None:
        chosen = {field.name: options.pop(field.name) for field in fields(ModelOptions)}
        verb(ModelOptions(**chosen), **options)

    spread.__name__, spread.__doc__ = verb.__name__, verb.__doc__
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread
