"""`kangaroo compare`: every drafter on one prompt, side by side."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kangaroo.bench.check import find_divergence
from kangaroo.bench.compare import Line, side_by_side
from kangaroo.bench.drafted import Drafted
from kangaroo.cli.generate import as_message
from kangaroo.cli.options import Json, MaxTokens, ModelOptions, with_model_options
from kangaroo.cli.terminal import notes, out, print_json, printable, show_lines
from kangaroo.decoder import Decoder
from kangaroo.errors import DataError
from kangaroo.inputs import read_text
from kangaroo.sampling import Sampling


@with_model_options
def compare(
    options: ModelOptions,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file instead.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")] = False,
    max_tokens: MaxTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the best tokens up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed answers of each drafter; medians are shown.")] = 3,
    as_json: Json = False,
) -> None:
    """Answer one prompt with every drafter: is the text the same, how fast, and where does the time go?"""
    text = read_prompt(prompt, file)
    decoders, left_out = options.open_all()
    plain = next(iter(decoders.values())).plain()
    tokens = plain.tokenizer.encode(text if raw or not plain.tokenizer.has_chat_template else as_message(text))
    methods = {name: Drafted(decoder) for name, decoder in ({"none": plain} | decoders).items()}
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    with notes.status("comparing") as status:
        lines = side_by_side(methods, tokens, sampling, max_tokens=max_tokens, repeats=repeats, report=status.update)
    identical = all(line.identical for line in lines)
    ties = {line.method for line in lines if not line.identical and is_tie(plain, tokens, lines[0], line, sampling)}
    exactness = plain.target.exactness
    if as_json:
        drafters = [asdict(line) | ({} if line.identical else {"tie": line.method in ties}) for line in lines]
        facts = {"identical": identical, "exactness": asdict(exactness), "drafters": drafters, "left_out": left_out}
        print_json(facts)
    else:
        out.print(Text(printable(plain.tokenizer.decode(lines[0].tokens)) + "\n"))
        show_lines(lines, left_out, ties, exactness)
    explained = ties if exactness.level == "ties" else set()
    if any(not line.identical and line.method not in explained for line in lines):
        raise typer.Exit(1)


def is_tie(plain: Decoder, prompt: Sequence[int], first: Line, other: Line, sampling: Sampling) -> bool:
    """Whether rounding explains why an answer is not the first's; answers that change from run to run are no tie."""
    if other.tokens == first.tokens:
        return False
    return find_divergence(plain, prompt, first.tokens, other.tokens, sampling).is_tie


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it is given."""
    if (prompt is None) == (file is None):
        raise DataError("give one prompt: as an argument, or by --file")
    if file is None:
        return prompt or ""
    return read_text(file, "prompt file", DataError)
