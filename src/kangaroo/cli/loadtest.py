"""`kangaroo loadtest`: a running server under load, with speculation and without."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kangaroo.bench.loadtest import NAMES, Load, load_page, run_load
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.cli.options import Json, MaxTokens
from kangaroo.cli.terminal import countdown, out, print_json
from kangaroo.files import write_json, write_text


def loadtest(
    url: Annotated[str, typer.Argument(help="The server's address.")] = "http://127.0.0.1:8123",
    at_once: Annotated[
        list[int] | None, typer.Option(help="Clients; may be repeated. Default: 1, 2, 4, 8, 16, 32.")
    ] = None,
    requests: Annotated[int, typer.Option(help="At every number of clients, at least one each.")] = 32,
    max_tokens: MaxTokens = 64,
    output: Annotated[Path | None, typer.Option(help="Folder for loadtest.json and loadtest.html.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a running server much at once, with speculation and without: speed, and are texts the same?

    The demo's held-out prompts are asked, greedy. The key is that in KANGAROO_API_KEY.
    """
    load = Load(
        url=url.rstrip("/"),
        key=os.environ.get("KANGAROO_API_KEY"),
        conversations=[prompt.messages for prompt in interleave_kinds(read_prompts(split="held-out"))],
        levels=at_once or [1, 2, 4, 8, 16, 32],
        requests=requests,
        max_tokens=max_tokens,
    )
    with countdown("levels of load") as report:
        facts = run_load(load, report)
    if output is not None:
        page = load_page(facts)
        write_json(output / "loadtest.json", facts)
        write_text(output / "loadtest.html", page)
    if as_json:
        print_json(facts)
        return
    for level in facts["levels"]:
        latencies = [
            f"{what} {level[name]['p50']:.3f} s (p99 {level[name]['p99']:.3f})"
            for name, what in (
                ("time_to_first_token", "first token"),
                ("time_per_token", "each further"),
                ("whole", "whole"),
            )
        ]
        speed = f"{level['tokens_per_second']:>8.1f} tokens/s"
        out.print(f"{level['at_once']:>3} at once, {NAMES[level['speculation']]:<16} {speed}   {'   '.join(latencies)}")
    out.print(f"{facts['identical']} of {facts['compared']} texts are the same with speculation and without")
    if facts["identical"] != facts["compared"]:
        raise typer.Exit(1)
