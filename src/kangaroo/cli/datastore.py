"""`kangaroo datastore`: what the rest drafter copies from."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from kangaroo.checks import counted
from kangaroo.cli.options import Json
from kangaroo.cli.terminal import notes, out, print_json, progress
from kangaroo.documents import read_documents
from kangaroo.drafters.copying.datastore import Stage, build_datastore
from kangaroo.loading import load_tokenizer
from kangaroo.machine import human_bytes

datastore = typer.Typer(no_args_is_help=True, help="Text for the rest drafter to copy from.")


@dataclass(frozen=True, slots=True)
class _Built:
    documents: int
    tokens: int
    bytes: int
    seconds: float


@datastore.command()
def build(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Chat JSONL(.gz), Parquet or text.")],
    output: Annotated[Path, typer.Option(help="The file to write, such as books.rest.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer: 'demo', a local folder, or a hub name.")] = "demo",
    as_json: Json = False,
) -> None:
    """Tokenise files as the model reads them, and index every place in them."""
    began = time.perf_counter()
    tokenizer = load_tokenizer(model)
    documents = [document for path in files for document in read_documents(path)]
    with progress("tokenising", len(documents), hidden=as_json) as advance:

        def report(stage: Stage, done: int) -> None:
            if stage != "tokenise" and not as_json:
                notes.print({"sort": "sorting", "write": "writing"}[stage], style="dim")
            advance(done)

        built = build_datastore(documents, tokenizer, output, report)
    facts = _Built(built.documents, built.tokens, output.stat().st_size, time.perf_counter() - began)
    if as_json:
        print_json(asdict(facts))
    else:
        content = f"{counted(facts.documents, 'document')}, {counted(facts.tokens, 'token')}"
        out.print(f"{output}: {content}, {human_bytes(facts.bytes)}, {facts.seconds:.1f} s")
