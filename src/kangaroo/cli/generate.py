"""`kangaroo generate`: one prompt, a file of them, or a chat."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kangaroo.cli.options import Drafter, Json, MaxTokens, ModelOptions, with_model_options
from kangaroo.cli.terminal import completion_facts, notes, print_json, show_batch, stats_facts, stream_answer
from kangaroo.completion import Completion, Stats
from kangaroo.decoder import Decoder
from kangaroo.errors import ConfigError, DataError
from kangaroo.inputs import read_text
from kangaroo.sampling import Sampling
from kangaroo.text import Prompt


@with_model_options
def generate(
    options: ModelOptions,
    drafter: Drafter = "kangaroo",
    prompt: Annotated[str | None, typer.Option(help="One prompt; without it and --prompts, a chat starts.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one per line, answered as a batch.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Keep the best tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this probable relative to the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    presence_penalty: Annotated[float, typer.Option()] = 0.0,
    frequency_penalty: Annotated[float, typer.Option()] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    min_tokens: Annotated[int, typer.Option(help="New tokens at least, whatever would end the answer.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Write on past the model's own end.")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="A file with a JSON schema that answers follow.")] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that answers match.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="One of these is the answer; repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Generate text: one prompt, a file of prompts as a batch, or an interactive chat."""
    if prompt is not None and prompts is not None:
        raise ConfigError("give --prompt or --prompts, not both")
    if as_json and prompt is None and prompts is None:
        raise ConfigError("--json is for answers to --prompt or --prompts; a chat has none")
    if samples != 1 and prompt is None and prompts is None:
        raise ConfigError("--samples is for answers to --prompt or --prompts; a chat has one at a time")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    asked: dict[str, Any] = {"sampling": sampling, "max_tokens": max_tokens, "min_tokens": min_tokens}
    asked |= {"stop": stop or (), "ignore_eos": ignore_eos}
    rules = given_rules(json_schema, regex, choice)
    decoder = options.open(drafter)
    asked |= {"processor": decoder.grammar(**rules)} if rules else {}
    as_prompt = str if raw or not decoder.tokenizer.has_chat_template else as_message
    if prompt is None and prompts is None:
        chat(decoder, asked)
    elif prompts is None and samples == 1 and not as_json:
        stream_answer(decoder.stream(as_prompt(prompt or ""), **asked))
    else:
        lines = read_lines(prompts) if prompts is not None else [prompt or ""]
        done = decoder.generate([as_prompt(line) for line in lines], n=samples, **asked)
        show([line for line in lines for _ in range(samples)], done, as_json=as_json)


def given_rules(json_schema: Path | None, regex: str | None, choice: list[str] | None) -> dict[str, Any]:
    """What answers are to follow, as Decoder.grammar takes it: at most one of the three."""
    given: dict[str, Any] = {"json_schema": json_schema, "regex": regex, "choice": choice or None}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"an answer follows one grammar, got {names}: give one")
    if json_schema is not None:
        given["json_schema"] = read_text(json_schema, "JSON schema", ConfigError)
    return given


def show(prompts: list[str], done: list[Completion], *, as_json: bool) -> None:
    """Finished answers, one for each prompt."""
    if as_json:
        facts = [completion_facts(line, answer) for line, answer in zip(prompts, done, strict=True)]
        print_json({"answers": facts, "stats": stats_facts(Stats.total(answer.stats for answer in done))})
    else:
        show_batch(prompts, done)


def as_message(text: str) -> Prompt:
    """A text as the only message of a conversation."""
    if not text:
        raise DataError("the prompt is empty: it must hold at least one token")
    return [{"role": "user", "content": text}]


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a file."""
    lines = [line for line in read_text(path, "prompt file", DataError).split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no prompts")
    return lines


def chat(decoder: Decoder, asked: dict[str, Any]) -> None:
    """A conversation in the terminal, until end of input."""
    if not decoder.tokenizer.has_chat_template:
        raise DataError("this model's tokenizer has no chat template: use --prompt with --raw")
    messages: list[dict[str, str]] = []
    notes.print("Chat; an empty line or Ctrl-D ends it.", style="dim")
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not said.strip():
            return
        messages.append({"role": "user", "content": said})
        try:
            answer = stream_answer(decoder.stream(messages, **asked))
        except DataError as error:
            if not sys.stdin.isatty():
                raise
            messages.pop()
            notes.print(f"{error}; that was left out: say less, or end the chat and begin another")
            continue
        messages.append({"role": "assistant", "content": answer})
