"""`kangaroo check`: is a drafter lossless on a model?"""

from dataclasses import asdict
from typing import Annotated

import typer

from kangaroo.bench.check import check as check_drafter
from kangaroo.bench.prompts import interleave_kinds, read_prompts
from kangaroo.cli.options import Drafter, Json, MaxTokens, ModelOptions, with_model_options
from kangaroo.errors import ConfigError
from kangaroo.terminal import notes, print_json, show_check
from kangaroo.text import Prompt


@with_model_options
def check(
    options: ModelOptions,
    drafter: Drafter = "kangaroo",
    temperature: Annotated[list[float] | None, typer.Option(help="May be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated.")] = None,
    prompts: Annotated[int, typer.Option(help="How many of the evaluation prompts.")] = 24,
    max_tokens: MaxTokens = 48,
    as_json: Json = False,
) -> None:
    """Is this drafter lossless on this model? Compares every answer with plain decoding, token by token."""
    decoder = options.open(drafter)
    if any(size < 1 for size in batch or ()):
        raise ConfigError(f"--batch must be at least 1, got {min(batch or ())}")
    chosen = interleave_kinds(read_prompts())[:prompts]
    texts: list[Prompt] = [
        p.messages if decoder.tokenizer.has_chat_template else p.messages[-1]["content"] for p in chosen
    ]
    with notes.status("checking") as status:
        report = check_drafter(
            decoder,
            [decoder.tokenizer.encode(text) for text in texts],
            temperatures=temperature or [0.0, 0.8],
            batches=batch or [1, 4],
            max_tokens=max_tokens,
            report=status.update,
        )
    if as_json:
        print_json({"lossless": report.problem is None, "problem": report.problem, **asdict(report)})
    else:
        show_check(report)
    if report.problem:
        raise typer.Exit(1)
