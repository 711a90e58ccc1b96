"""`kangaroo serve`: an OpenAI-compatible server."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kangaroo.cli.options import ModelOptions, with_model_options
from kangaroo.cli.terminal import notes
from kangaroo.drafters import DRAFTERS, find_drafter
from kangaroo.engine import Engine
from kangaroo.errors import ConfigError
from kangaroo.machine import bound_kernel_caches

try:
    from kangaroo.serve.app import LARGEST_BODY, Access, make_app
    from kangaroo.serve.guard import LOCAL
    from kangaroo.serve.run import address_of, check_key, open_socket, read_key, run
    from kangaroo.serve.service import Service
except ModuleNotFoundError as error:
    raise ConfigError(f"the server needs {error.name}: pip install 'kangaroo-decoding[serve]'") from None

KEY = "KANGAROO_API_KEY"
OFFERED = ("kangaroo+lookup", "kangaroo", "prompt-lookup")
"""Without --drafter: what an adapter serves, and what needs none."""
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@with_model_options
def serve(
    options: ModelOptions,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated: requests may choose, the first is the default. Default: {', '.join(OFFERED)}. "
            f"One of {', '.join(DRAFTERS)}."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8123,
    served_name: Annotated[str | None, typer.Option(help="What clients call the model. Default: its name.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"Holds the key that clients must send; or set {KEY}.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Answers written at once.")] = 16,
    queue: Annotated[int, typer.Option(help="Answers that may wait for a row; beyond that, 429.")] = 256,
    capacity: Annotated[int | None, typer.Option(help="Tokens a row holds. Default: the context, if it fits.")] = None,
    drain: Annotated[float, typer.Option(help="Seconds that requests have to finish at the end.")] = 30.0,
    largest_body: Annotated[int, typer.Option(help="Bytes of a request.")] = LARGEST_BODY,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A page's origin that may use the server, or *; may be repeated.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name the server goes by; may be repeated. Default: local ones, if local."),
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line for every request.")] = False,
) -> None:
    """Answer requests of OpenAI's clients: chat, completions, streams. Ctrl-C ends it in good order."""
    if not 0 <= drain <= 86400:
        raise ConfigError(f"--drain must be in 0..86400 seconds, got {drain}")
    if largest_body < 1:
        raise ConfigError(f"--largest-body must be at least 1, got {largest_body}")
    first, *others = dict.fromkeys(drafter or OFFERED)
    for name in others:
        find_drafter(name)  # a wrong name should not wait for the model to load
    hosts = [*LOCAL, *(allow_host or ())] if allow_host or host in LOOPBACK else None
    access = Access(key=_key(api_key_file), hosts=hosts, origins=allow_origin or (), largest_body=largest_body)
    name = served_name or (options.model if not Path(options.model).exists() else Path(options.model).resolve().name)
    listening = open_socket(host, port)
    bound_kernel_caches()

    def load() -> Engine:
        return options.open(first).engine(rows=rows, queue=queue, capacity=capacity, also=others)

    if host not in LOOPBACK and access.key is None:
        notes.print("there is no API key: whoever reaches this address may use the model", soft_wrap=True)
    service = Service(load, name)
    address = address_of(listening)
    notes.print(f"listening on {address}; loading {options.model}", soft_wrap=True)
    run(
        make_app(service, access, drain=drain),
        service,
        listening,
        drain,
        ready=lambda: notes.print(f"ready: {name} with {'; '.join(service.engine.drafters.values())}", soft_wrap=True),
        access_log=access_log,
    )


def _key(path: Path | None) -> str | None:
    if path is not None:
        return read_key(path)
    given = os.environ.get(KEY)
    return None if given is None else check_key(given, KEY)
