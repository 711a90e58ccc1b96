"""The command line: one thin verb per use of the library. The only file that prints."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from kangaroo.bench.check import Difference, check, find_difference
from kangaroo.bench.compare import Pair, compare, without_end
from kangaroo.bench.cost import describe, measure_costs
from kangaroo.bench.prompts import interleave_kinds, read_prompts
from kangaroo.decoder import Decoder, load
from kangaroo.errors import ConfigError, DataError, KangarooError
from kangaroo.sampling import Sampling
from kangaroo.terminal import (
    comparison_facts,
    completion_facts,
    notes,
    out,
    print_error,
    print_json,
    progress,
    show_batch,
    show_check,
    show_comparison,
    show_table,
    stats_facts,
    stream_answer,
    training_progress,
)
from kangaroo.text import Prompt
from kangaroo.training.run import train as train_recipe

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Model = Annotated[str, typer.Option(help="'demo', a local folder, or a hub name.")]
DrafterName = Annotated[
    str, typer.Option("--drafter", help="none, kangaroo, kangaroo-tree, early-exit, early-exit-tree.")
]
AdapterFolder = Annotated[Path | None, typer.Option("--adapter", help="Folder written by `kangaroo train`.")]
ExitLayer = Annotated[int | None, typer.Option(help="early-exit: layers to draft with.")]
MaxDraft = Annotated[int | None, typer.Option(help="Drafted tokens (tree: levels) per round at most.")]
Threshold = Annotated[float | None, typer.Option(help="Confidence below which drafting stops.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
MaxTokens = Annotated[int, typer.Option(help="New tokens at most.")]


def open_decoder(
    model: str, drafter: str, adapter: Path | None, dtype: str | None, threads: int | None, **settings: Any
) -> Decoder:
    """A Decoder from command-line options; unset drafter settings keep their defaults."""
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    kinds = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if dtype is not None and dtype not in kinds:
        raise ConfigError(f"--dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    chosen = {name: value for name, value in settings.items() if value is not None}
    return load(model, drafter=drafter, adapter=adapter, dtype=kinds[dtype] if dtype else None, **chosen)


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(help="Held-out prompts to answer.")] = 18,
    max_tokens: MaxTokens = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    threads: Threads = 1,  # for so small a model a second thread costs more than it brings
    as_json: Json = False,
) -> None:
    """Answer held-out prompts with the demo model, with Kangaroo and without, and compare texts and speed."""
    decoder = open_decoder("demo", "kangaroo", None, None, threads)
    chosen = interleave_kinds(read_prompts(split="held-out"))[:prompts]
    sampling = Sampling(temperature=temperature, seed=1)
    if not as_json:
        stream_answer(decoder, chosen[0].messages, max_tokens, sampling)
    # Ends are barred so that every answer has exactly max_tokens: short answers would measure prefill.
    measured = without_end(sampling, decoder.eos)
    with progress("with Kangaroo and without, in turn", len(chosen), hidden=as_json) as advance:
        result = compare(
            decoder.plain(),
            decoder,
            [p.messages for p in chosen],
            max_tokens=max_tokens,
            sampling=measured,
            report=lambda _: advance(),
        )
    ties = sum(examine(decoder, pair, measured).is_tie for pair in result.differing)
    facts = comparison_facts(result, decoder, measured) | {"ties": ties}
    if as_json:
        print_json(facts)
    else:
        show_comparison(facts)
    if ties < len(result.differing):
        raise typer.Exit(1)


def examine(decoder: Decoder, pair: Pair, sampling: Sampling) -> Difference:
    """How close the call was where a pair's answers part."""
    expected, got = pair.baseline.completion.tokens, pair.method.completion.tokens
    return find_difference(decoder, decoder.tokenizer.encode(pair.prompt), expected, got, sampling)


@app.command()
def generate(
    model: Model = "demo",
    drafter: DrafterName = "kangaroo",
    adapter: AdapterFolder = None,
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
    exit_layer: ExitLayer = None,
    max_draft: MaxDraft = None,
    threshold: Threshold = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text: one prompt, a file of prompts as a batch, or an interactive chat."""
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
    decoder = open_decoder(
        model, drafter, adapter, dtype, threads, exit_layer=exit_layer, max_draft=max_draft, threshold=threshold
    )
    answer_with(decoder, prompt, prompts, Ask(raw, max_tokens, sampling, tuple(stop or ())), as_json)


@dataclass(frozen=True, slots=True)
class Ask:
    """How prompts are to be answered."""

    raw: bool
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


def answer_with(decoder: Decoder, prompt: str | None, prompts: Path | None, ask: Ask, as_json: bool) -> None:
    """Answer one prompt, a file of them, or whatever is typed."""
    as_prompt = str if ask.raw or not decoder.tokenizer.has_chat_template else as_message
    if prompt is None and prompts is None:
        chat(decoder, ask)
        return
    lines = read_lines(prompts) if prompts is not None else [prompt or ""]
    if not as_json and prompts is None:
        stream_answer(decoder, as_prompt(lines[0]), ask.max_tokens, ask.sampling, ask.stop)
        return
    done = decoder.generate(
        [as_prompt(line) for line in lines], max_tokens=ask.max_tokens, sampling=ask.sampling, stop=ask.stop
    )
    facts = [completion_facts(line, answer) for line, answer in zip(lines, done, strict=True)]
    if not as_json:
        show_batch(lines, done, decoder.stats)
    elif prompts is None:
        print_json(facts[0] | stats_facts(decoder.stats))
    else:
        print_json({"answers": facts} | stats_facts(decoder.stats))


def as_message(text: str) -> Prompt:
    """A text as the only message of a conversation."""
    if not text:
        raise DataError("the prompt is empty: it must hold at least one token")
    return [{"role": "user", "content": text}]


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a file."""
    if not path.is_file():
        raise DataError(f"no prompt file at {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no prompts")
    return lines


def chat(decoder: Decoder, ask: Ask) -> None:
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
        answer = stream_answer(decoder, messages, ask.max_tokens, ask.sampling, ask.stop)
        messages.append({"role": "assistant", "content": answer})


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo-adapter.toml.")],
    data: Annotated[list[Path], typer.Option("--data", help="Chat JSONL(.gz), Parquet or text; may be repeated.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    threads: Threads = None,
) -> None:
    """Train what a recipe describes: an adapter for a target, or a target from scratch."""
    if threads is not None:
        torch.set_num_threads(threads)
    overrides: dict[str, Any] = {} if output is None else {"output": str(output)}
    if max_steps is not None:
        overrides["schedule.steps"] = max_steps
    with training_progress() as report:
        folder = train_recipe(recipe, data, overrides=overrides, resume=resume, report=report)
    out.print(f"best weights: {folder}")


@app.command(name="check")
def check_command(
    model: Model = "demo",
    drafter: DrafterName = "kangaroo",
    adapter: AdapterFolder = None,
    temperature: Annotated[list[float] | None, typer.Option(help="May be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be repeated.")] = None,
    prompts: Annotated[int, typer.Option(help="How many of the evaluation prompts.")] = 24,
    max_tokens: MaxTokens = 48,
    exit_layer: ExitLayer = None,
    max_draft: MaxDraft = None,
    threshold: Threshold = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Is this drafter lossless on this model? Compares every answer with plain decoding, token by token."""
    decoder = open_decoder(
        model,
        drafter,
        adapter,
        dtype,
        threads,
        exit_layer=exit_layer,
        max_draft=max_draft,
        threshold=threshold,
    )
    if any(size < 1 for size in batch or ()):
        raise ConfigError(f"--batch must be at least 1, got {min(batch or ())}")
    chosen = interleave_kinds(read_prompts())[:prompts]
    texts: list[Prompt] = [
        p.messages if decoder.tokenizer.has_chat_template else p.messages[-1]["content"] for p in chosen
    ]
    with notes.status("checking") as status:
        report = check(
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


@app.command()
def info(
    model: Model = "demo",
    drafter: DrafterName = "kangaroo",
    adapter: AdapterFolder = None,
    exit_layer: ExitLayer = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Sizes of target and adapter, and what drafting costs here as a share of a full step."""
    decoder = open_decoder(model, drafter, adapter, dtype, threads, exit_layer=exit_layer)
    facts = describe(decoder)
    costs = measure_costs(decoder)
    facts["full_step_seconds"] = costs.full_step
    facts["shallow_share"] = costs.shallow / costs.full_step
    facts["adapter_share"] = costs.adapter / costs.full_step
    facts["head_share"] = costs.head / costs.full_step
    facts["draft_step_share"] = costs.draft_share
    facts["verify_share"] = {count: seconds / costs.full_step for count, seconds in costs.verify.items()}
    if as_json:
        print_json(facts)
        return
    show_table(facts)


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2."""
    disable_progress_bar()
    try:
        app()
    except KangarooError as error:
        print_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt as interruption:
        if str(interruption):
            notes.print(str(interruption))
        sys.exit(130)
