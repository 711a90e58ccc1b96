"""`kangaroo check`: is a drafter lossless on a model?"""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from kangaroo.bench.check import SAMPLINGS, CheckReport, expect
from kangaroo.bench.check import check as check_drafter
from kangaroo.bench.questions import interleave_kinds, read_prompts
from kangaroo.cli.options import Json, MaxTokens, ModelOptions, with_model_options
from kangaroo.cli.terminal import notes, print_json, show_checks, verdict
from kangaroo.drafters import DRAFTERS
from kangaroo.errors import ConfigError
from kangaroo.sampling import Sampling
from kangaroo.text import Prompt


@with_model_options
def check(
    options: ModelOptions,
    drafter: Annotated[str, typer.Option(help=f"{', '.join(DRAFTERS)}; or all.")] = "kangaroo",
    temperature: Annotated[
        list[float] | None, typer.Option(help="May be repeated. Default: 0; 0.8 with top-p; 1.2 with penalties.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many of the evaluation prompts.")] = 24,
    max_tokens: MaxTokens = 48,
    as_json: Json = False,
) -> None:
    """Is this drafter lossless on this model? Compares every answer with plain decoding, token by token."""
    if any(size < 1 for size in batch or ()):
        raise ConfigError(f"--batch must be at least 1, got {min(batch or ())}")
    samplings = [Sampling(temperature=t, seed=1) for t in temperature] if temperature else SAMPLINGS
    decoders, left_out = options.open_all() if drafter == "all" else ({drafter: options.open(drafter)}, {})
    any_decoder = next(iter(decoders.values()))
    chosen = interleave_kinds(read_prompts())[:prompts]
    texts: list[Prompt] = [
        p.messages if any_decoder.tokenizer.has_chat_template else p.messages[-1]["content"] for p in chosen
    ]
    reports = {}
    with notes.status("checking") as status:
        encoded = [any_decoder.tokenizer.encode(text) for text in texts]
        expected = expect(any_decoder, encoded, samplings, max_tokens=max_tokens, report=status.update)
        for name, decoder in decoders.items():
            status.update(name)
            reports[name] = check_drafter(decoder, expected, batches=batch or [1, 4])
            if len(decoders) > 1:  # all of them take a while
                notes.print(f"{name}: {verdict(reports[name])}", soft_wrap=True)
    lossless = all(report.problem is None for report in reports.values())
    if as_json:
        facts = {name: _facts(report) for name, report in reports.items()}
        exactness = asdict(any_decoder.target.exactness)
        print_json({"lossless": lossless, "exactness": exactness, "drafters": facts, "left_out": left_out})
    else:
        show_checks(reports, left_out, any_decoder.target.exactness)
    if not lossless:
        raise typer.Exit(1)


def _facts(report: CheckReport) -> dict[str, Any]:
    ties = [asdict(found) | {"tie": found.is_tie} for found in report.differences]
    return asdict(report) | {"differences": ties, "problem": report.problem}
