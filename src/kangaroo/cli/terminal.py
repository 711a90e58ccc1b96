"""How results look: colour and bars for people, JSON for machines, plain text in a pipe."""

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from kangaroo.bench.check import CheckReport, Divergence
from kangaroo.bench.compare import Line, PairedRun
from kangaroo.checks import counted
from kangaroo.cli.tables import print_facts, print_rows
from kangaroo.completion import Completion, Stats
from kangaroo.decoder import Decoder
from kangaroo.machine import human_bytes
from kangaroo.sampling import Sampling
from kangaroo.streaming import AnswerStream
from kangaroo.training.estimate import Plan, RunEstimate
from kangaroo.training.report import News, TrainingReport
from kangaroo.trial import Exactness

# A pipe has no width that tables would have to fit into.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
notes = Console(stderr=True, highlight=False)
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object on standard output, as cli/schema.py describes it."""
    sys.stdout.write(json.dumps(_without_nan(facts), allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """JSON has no infinity: null stands for what is not a finite number."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """A model's text for a terminal: control characters are shown, not obeyed. Piped text stays as it is."""
    return text.translate(_CONTROL_PICTURES) if out.is_terminal else text


def stream_answer(stream: AnswerStream) -> str:
    """Show an answer: green and underlined where drafted and accepted, plain where the token is the target's own."""
    parts = []
    for piece in stream:
        parts.append(piece.text)
        out.print(Text(printable(piece.text), style="green underline" if piece.drafted else ""), end="")
    out.print()
    stats = stream.stats
    tokens = counted(stats.emitted, "token")
    drafted = f"{stats.accepted} of {tokens} drafted" if stats.accepted else tokens
    notes.print(
        f"{drafted}, {stats.compression_rate:.2f} per round, {stats.tokens_per_second:.1f} tokens/s", style="dim"
    )
    return "".join(parts)


def show_batch(prompts: list[str], done: list[Completion]) -> None:
    """Answers of a batch, in order."""
    stats = Stats.total(answer.stats for answer in done)
    for prompt, answer in zip(prompts, done, strict=True):
        out.print(Text(f"> {prompt}", style="dim"))
        out.print(Text(printable(answer.text) + "\n"))
    notes.print(f"{stats.compression_rate:.2f} per round, {stats.tokens_per_second:.1f} tokens/s", style="dim")


def completion_facts(prompt: str, completion: Completion) -> dict[str, Any]:
    """A completion for machines."""
    names = ("text", "tokens", "drafted", "finish_reason", "stopped_by", "prompt_tokens")
    return {"prompt": prompt, **{name: getattr(completion, name) for name in names}}


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


def comparison_facts(result: PairedRun, decoder: Decoder, sampling: Sampling) -> dict[str, Any]:
    """The figures of a comparison, for people and machines alike."""
    varied = result.without_repetitions()
    return {
        "identical": result.identical,
        "differing": len(result.differing),
        "speedup": round(result.speedup, 3),
        "cr": round(result.compression_rate, 3),
        "tokens_per_second": round(result.method_speed, 1),
        "baseline_tokens_per_second": round(result.baseline_speed, 1),
        "decode_speedup": round(result.decode_speedup, 3),
        "speedup_without_repetitions": round(varied.speedup, 3) if varied.pairs else None,
        "cr_without_repetitions": round(varied.compression_rate, 3) if varied.pairs else None,
        "prompts": len(result.pairs),
        "prompts_without_repetitions": len(varied.pairs),
        "tokens": sum(len(pair.method.tokens) for pair in result.pairs),
        "temperature": sampling.temperature,
        "exactness": asdict(decoder.target.exactness),
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def show_comparison(facts: dict[str, Any]) -> None:
    """The closing lines of a comparison."""
    verdict = "identical, every token"
    if facts["differing"]:
        verdict = f"{facts['differing']} differ, {facts['ties']} of them by a tie in rounding; see `kangaroo check`"
    setting = f"{facts['dtype']}, threads: {facts['threads']}, temperature {facts['temperature']:g}"
    out.print(f"{counted(facts['prompts'], 'held-out prompt')}, {counted(facts['tokens'], 'token')}, {setting}")
    out.print(f"  plain decoding  {facts['baseline_tokens_per_second']:7.1f} tokens/s")
    out.print(f"  Kangaroo        {facts['tokens_per_second']:7.1f} tokens/s, {facts['cr']:.2f} tokens per round")
    out.print(f"  speed-up        {facts['speedup']:7.2f} times")
    out.print(f"  texts           {verdict}")
    out.print(f"  exactness       {facts['exactness']['level']} ({facts['exactness']['reason']})")


def show_checks(reports: dict[str, CheckReport], left_out: dict[str, str], exactness: Exactness) -> None:
    """What a check of one or more drafters found."""
    out.print(f"exactness: {exactness}")
    rounds = ("rounds that accepted none", "some", "all", "had no draft")
    rows = []
    for name, report in reports.items():
        counts = (report.answers, report.tokens, report.bits, *astuple(report.rounds))
        rows.append((name, verdict(report), *map(str, counts)))
    print_rows(out, ("drafter", "verdict", "answers", "tokens", "other bits", *rounds), rows, texts=["verdict"])
    _print_left_out(left_out)
    for name, report in reports.items():
        if report.problem is not None:
            out.print(f"{name}: {verdict(report)}: {report.problem}")
        for found in report.differences[:10]:
            out.print(f"{name}: {_difference_line(found)}")
    if all(report.problem is None for report in reports.values()):
        texts = [found for report in reports.values() for found in report.differences]
        same = "every token is the same" if not texts else f"texts that part at a tie in rounding: {len(texts)}"
        out.print(f"lossless: {same}" + (", to the last bit of its logits" if exactness.level == "bitwise" else ""))


def verdict(report: CheckReport) -> str:
    """Of a check, in a word."""
    if report.problem is None:
        return "lossless"
    return "inconclusive" if report.failure is None else "FAILED"


def _difference_line(found: Divergence) -> str:
    return (
        f"prompt {found.prompt}, temperature {found.temperature:g}, batch {found.batch}: token {found.position} is "
        f"{found.got}, plain decoding has {found.expected}; gap {found.gap:.3g}, of which rounding "
        f"explains {found.bound:.2g}; float64 draws {found.float64}{' (a tie)' if found.is_tie else ''}"
    )


def show_lines(lines: Sequence[Line], left_out: dict[str, str], ties: Collection[str], exactness: Exactness) -> None:
    """Methods side by side; `ties` differ by rounding."""
    out.print(f"exactness: {exactness}")
    rows = []
    for line in lines:
        text = "identical" if line.identical else "a tie" if line.method in ties else "DIFFERS"
        speeds = (f"{line.tokens_per_second:.1f}", f"{line.speedup:.2f}", f"{line.compression_rate:.2f}")
        shares = (f"{part / line.seconds:.0%}" for part in (line.prefill, line.draft, line.verify, line.rest))
        rows.append((line.method, text, *speeds, str(line.drafted), str(line.accepted), *shares))
    figures = ("tokens/s", "speed-up", "CR", "drafted", "accepted", "prefill", "draft", "verify", "rest")
    print_rows(out, ("drafter", "text", *figures), rows, texts=["text"])
    _print_left_out(left_out)


def _print_left_out(left_out: dict[str, str]) -> None:
    for name, reason in left_out.items():
        out.print(f"left out: {name} ({reason})", style="dim")


def show_table(facts: dict[str, Any]) -> None:
    """Names and values."""
    print_facts(out, {name.replace("_", " "): _readable(value) for name, value in facts.items()})


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key}: {_readable(entry)}" for key, entry in value.items())
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def progress(description: str, total: int, *, hidden: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; call what it yields with how many more pieces of work are finished."""
    with _bar(hidden) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda done: bar.advance(task, done)


@contextmanager
def countdown(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left; call what it yields with (done, total), first before anything is done."""
    starts: list[tuple[float, int]] = []
    with _bar() as bar:
        task = bar.add_task(description, total=None, note="")

        def show(done: int, total: int) -> None:
            starts.append((time.perf_counter(), done))
            (began, first), (here, _) = starts[0], starts[-1]
            left = (here - began) / (done - first) * (total - done) if done > first else float("inf")
            bar.update(task, completed=done, total=total, note=f"{_clock(left)} left")

        yield show


@contextmanager
def training_progress() -> Iterator[TrainingReport]:
    """A bar per stage with throughput and time left; plans, estimates and evaluations are lines above it."""
    tasks: dict[str, TaskID] = {}
    with _bar() as bar:

        def show(news: News) -> None:
            if isinstance(news, RunEstimate):
                bar.print(_estimate_line(news))
            elif isinstance(news, Plan):
                bar.print(_plan_lines(news))
            elif news.stage == "evaluate":
                shown = "  ".join(f"{k.removeprefix('held_out/')} {v:.4g}" for k, v in news.figures.items())
                bar.print(shown)
            else:
                if news.stage not in tasks:
                    tasks[news.stage] = bar.add_task(news.stage, total=news.total, note="")
                loss = f"loss {news.figures['loss']:.3f}  " if "loss" in news.figures else ""
                note = f"{loss}{news.tokens_per_second:,.0f} tokens/s  {_clock(news.eta)} left"
                bar.update(tasks[news.stage], completed=news.done, note=note)

        yield show


def _bar(hidden: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
    )
    return Progress(*columns, console=notes, disable=hidden)


def _estimate_line(news: RunEstimate) -> str:
    fits = "" if news.fits else f", more than the {human_bytes(news.available_bytes)} that are free"
    return (
        f"{news.parameters:,} trained parameters; about {human_bytes(news.peak_bytes)} of memory{fits}; "
        f"{news.seconds_per_step:.2f} s a step on text not seen before, at that pace {_clock(news.seconds)} in all"
    )


def _plan_lines(plan: Plan) -> str:
    drafted = f" over {plan.draft_vocabulary:,} tokens" if plan.draft_vocabulary else ""
    early, trigram = plan.floors.early_exit, plan.floors.trigram
    return (
        f"exit behind {plan.exit_layer} of {plan.target_layers} layers; drafting a token{drafted} reads "
        f"{plan.draft_share:.2f} of a plain step's weights\n"
        f"{plan.steps:,} steps over {plan.documents:,} documents ({plan.epochs:.1f} times each), "
        f"{_clock(plan.seconds)} in all\n"
        f"to beat, in tokens a round: early exit {early.rate:.2f} (agrees {early.agreement:.2f}), "
        f"a trigram {trigram.rate:.2f} ({trigram.agreement:.2f})\n"
        "watch simulated_cr: it should pass both within the first evaluations, and grows with every doubling of steps"
    )


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
