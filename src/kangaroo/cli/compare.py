"""`kangaroo compare`: every drafter on one prompt, side by side."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kangaroo.bench.compare import side_by_side
from kangaroo.bench.drafted import Drafted
from kangaroo.cli.generate import as_message
from kangaroo.cli.options import Json, MaxTokens, ModelOptions, with_model_options
from kangaroo.cli.terminal import notes, out, print_json, printable, show_lines
from kangaroo.errors import DataError
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
    exactness = plain.target.exactness
    if as_json:
        print_json(
            {
                "identical": identical,
                "exactness": asdict(exactness),
                "drafters": [asdict(line) for line in lines],
                "left_out": left_out,
            }
        )
    else:
        out.print(Text(printable(plain.tokenizer.decode(lines[0].tokens)) + "\n"))
        show_lines(lines, left_out, exactness)
    if not identical:
        raise typer.Exit(1)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it is given."""
    if (prompt is None) == (file is None):
        raise DataError("give one prompt: as an argument, or by --file")
    if file is None:
        return prompt or ""
    if not file.is_file():
        raise DataError(f"no prompt file at {file}")
    return file.read_text(encoding="utf-8")
