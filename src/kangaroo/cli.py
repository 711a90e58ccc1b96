"""The command line: one thin verb per use of the library. The only file that prints."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from kangaroo.bench.check import CheckReport, check
from kangaroo.bench.compare import Comparison, compare, without_end
from kangaroo.bench.cost import describe, measure_costs
from kangaroo.bench.prompts import interleave_kinds, read_prompts
from kangaroo.decoder import Completion, Decoder, Stats, load
from kangaroo.errors import ConfigError, DataError, KangarooError
from kangaroo.sampling import Sampling
from kangaroo.text import Prompt

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
out, notes = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)

_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}

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
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Answer held-out prompts with the demo model, with Kangaroo and without, and compare texts and speed."""
    decoder = open_decoder("demo", "kangaroo", None, None, threads)
    chosen = interleave_kinds(read_prompts(split="held-out"))[:prompts]
    sampling = Sampling(temperature=temperature, seed=1)
    if not as_json:
        show_answer(decoder, chosen[0].messages, max_tokens, sampling)
    # Ends are barred so that every answer has exactly max_tokens: short answers would measure prefill.
    measured = without_end(sampling, decoder.eos)
    with progress(as_json) as bar:
        task = bar.add_task("with and without Kangaroo, in turn", total=len(chosen))
        result = compare(
            decoder.plain(),
            decoder,
            [p.messages for p in chosen],
            max_tokens=max_tokens,
            sampling=measured,
            report=lambda pair: bar.advance(task),
        )
    facts = comparison_facts(result, decoder, temperature)
    if as_json:
        print_json(facts)
    else:
        show_comparison(facts)
    if not result.identical:
        raise typer.Exit(1)


def comparison_facts(result: Comparison, decoder: Decoder, temperature: float) -> dict[str, Any]:
    """The figures of a comparison, for people and machines alike."""
    varied = result.without_repetitions()
    return {
        "identical": result.identical,
        "speedup": round(result.speedup, 3),
        "cr": round(result.compression_rate, 3),
        "tokens_per_second": round(result.method_speed, 1),
        "baseline_tokens_per_second": round(result.baseline_speed, 1),
        "decode_speedup": round(result.decode_speedup, 3),
        "speedup_without_repetitions": round(varied.speedup, 3) if varied.pairs else None,
        "cr_without_repetitions": round(varied.compression_rate, 3) if varied.pairs else None,
        "prompts": len(result.pairs),
        "prompts_without_repetitions": len(varied.pairs),
        "tokens": sum(len(pair.method.completion.tokens) for pair in result.pairs),
        "temperature": temperature,
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def show_comparison(facts: dict[str, Any]) -> None:
    """The demo's closing lines."""
    out.print(
        f"{facts['prompts']} held-out prompts, {facts['tokens']} tokens, {facts['dtype']}, {facts['threads']} threads"
    )
    out.print(f"  plain decoding  {facts['baseline_tokens_per_second']:7.1f} tokens/s")
    out.print(f"  Kangaroo        {facts['tokens_per_second']:7.1f} tokens/s, {facts['cr']:.2f} tokens per round")
    verdict = "identical, every token" if facts["identical"] else "NOT IDENTICAL: run `kangaroo check`"
    out.print(f"  speed-up        {facts['speedup']:7.2f} times")
    out.print(f"  texts           {verdict}")


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
        model,
        drafter,
        adapter,
        dtype,
        threads,
        exit_layer=exit_layer,
        max_draft=max_draft,
        threshold=threshold,
    )
    as_prompt = str if raw or not decoder.tokenizer.has_chat_template else as_message
    if prompts is not None:
        lines = read_lines(prompts)
        done = decoder.generate(
            [as_prompt(x) for x in lines], max_tokens=max_tokens, sampling=sampling, stop=stop or ()
        )
        show_batch(lines, done, decoder.stats, as_json)
    elif prompt is not None and as_json:
        answer = decoder.generate([as_prompt(prompt)], max_tokens=max_tokens, sampling=sampling, stop=stop or ())[0]
        print_json(completion_facts(prompt, answer) | stats_facts(decoder.stats))
    elif prompt is not None:
        if not prompt:
            raise DataError("the prompt is empty: it must hold at least one token")
        show_answer(decoder, as_prompt(prompt), max_tokens, sampling, stop or ())
    else:
        chat(decoder, max_tokens, sampling, stop or ())


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


def chat(decoder: Decoder, max_tokens: int, sampling: Sampling, stop: Sequence[str]) -> None:
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
        answer = show_answer(decoder, messages, max_tokens, sampling, stop)
        messages.append({"role": "assistant", "content": answer})


def show_answer(decoder: Decoder, prompt: Prompt, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()) -> str:
    """Stream an answer: green where drafted and accepted, plain where it is the target's own token."""
    parts = []
    for piece in decoder.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop):
        parts.append(piece.text)
        out.print(Text(printable(piece.text), style="green" if piece.drafted else ""), end="")
    stats = decoder.stats
    out.print()
    share = (
        f"{stats.accepted} of {stats.emitted} tokens drafted (green)" if out.is_terminal else f"{stats.emitted} tokens"
    )
    notes.print(
        f"{share}, {stats.compression_rate:.2f} per round, {stats.tokens_per_second:.1f} tokens/s",
        style="dim",
    )
    return "".join(parts)


def printable(text: str) -> str:
    """A model's text for a terminal: control characters are shown, not obeyed. Piped text stays as it is."""
    return text.translate(_CONTROL_PICTURES) if out.is_terminal else text


def show_batch(prompts: list[str], done: list[Completion], stats: Stats, as_json: bool) -> None:
    """Answers of a batch, in order."""
    if as_json:
        print_json(
            {"answers": [completion_facts(p, c) for p, c in zip(prompts, done, strict=True)]} | stats_facts(stats)
        )
        return
    for prompt, answer in zip(prompts, done, strict=True):
        out.print(Text(f"> {prompt}", style="dim"))
        out.print(Text(printable(answer.text) + "\n"))
    notes.print(f"{stats.compression_rate:.2f} per round, {stats.tokens_per_second:.1f} tokens/s", style="dim")


def completion_facts(prompt: str, completion: Completion) -> dict[str, Any]:
    """A completion for machines."""
    return {"prompt": prompt, **asdict(completion)}


def stats_facts(stats: Stats) -> dict[str, Any]:
    """Stats for machines."""
    return {
        "emitted": stats.emitted,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "cr": stats.compression_rate,
        "tokens_per_second": stats.tokens_per_second,
    }


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
    from kangaroo.training import run

    if threads is not None:
        torch.set_num_threads(threads)
    overrides: dict[str, Any] = {} if output is None else {"output": str(output)}
    if max_steps is not None:
        overrides["schedule.steps"] = max_steps
    folder = run.train(recipe, data, overrides=overrides, resume=resume, report=lambda row: out.print(row))
    out.print(f"trained weights: {folder}")


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
    show_check(report, as_json)
    if report.problem:
        raise typer.Exit(1)


def show_check(report: CheckReport, as_json: bool) -> None:
    """What a check found."""
    if as_json:
        print_json({"lossless": report.problem is None, "problem": report.problem, **asdict(report)})
        return
    rounds = report.rounds
    out.print(f"{report.answers} answers, {report.tokens} tokens compared")
    out.print(
        f"rounds that accepted none {rounds.none}, some {rounds.some}, all {rounds.all}; undrafted {rounds.undrafted}"
    )
    for found in report.differences[:10]:
        out.print(
            f"prompt {found.prompt}, temperature {found.temperature:g}, batch {found.batch}: token {found.position} is "
            f"{found.got}, plain decoding has {found.expected}; gap {found.gap:.3g}; float64 draws {found.float64}"
        )
    out.print("lossless: every token is the same" if report.problem is None else f"FAILED: {report.problem}")


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
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _readable(value))
    out.print(table)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key}: {_readable(entry)}" for key, entry in value.items())
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def progress(hidden: bool) -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeRemainingColumn(), console=notes, transient=True, disable=hidden)


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(facts) + "\n")


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2."""
    disable_progress_bar()
    try:
        app()
    except KangarooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
