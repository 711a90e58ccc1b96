"""A run in words: what came out in a sentence or two, and what it comes from as names and values."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kangaroo.bench.report.results import Run
from kangaroo.bench.report.statistics import Summary
from kangaroo.bench.report.tables import UNKNOWN, span
from kangaroo.machine import human_bytes

APART = frozenset({"costs", "output"})
"""What has a table of its own, or says nothing to a reader."""


def lead(run: Run) -> str:
    """What was asked, which method was fastest, and whether the answers are plain decoding's."""
    plain, methods = run.baseline, run.overall()
    sentences = [
        f"{_count(plain.questions, 'question')}, {_count(plain.answers, 'answer')} by each method, "
        f"{_count(plain.tokens, 'token')} by the baseline."
    ]
    if plain.dropped_tokens:
        dropped = _count(plain.dropped_tokens, "token")
        sentences.append(f"Prompts too long for the context lost {dropped} from their middle, for all methods alike.")
    sentences.append(f"Plain decoding: {plain.tokens_per_second:.1f} tokens/s.")
    if methods:
        best = max(methods, key=lambda summary: summary.speedup.value)
        sentences += [f"Fastest: {best.method}, {span(best.speedup)} times as fast.", _agreement(run)]
    return " ".join(sentences)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _agreement(run: Run) -> str:
    compared = [summary for summary in run.overall() if summary.method not in run.drawn]
    said = [_compared(compared)] if compared else []
    said += [f"{', '.join(sorted(run.drawn))}: by rejection, texts of their own."] if run.drawn else []
    return " ".join(said)


def _compared(methods: Sequence[Summary]) -> str:
    differing, ties = sum(len(s.differences) for s in methods), sum(s.ties for s in methods)
    if not differing:
        return "Every answer is plain decoding's, token by token."
    answers = sum(s.answers for s in methods)
    return f"Of {answers:,} answers {differing} differ from plain decoding's, {ties} of them by a tie in rounding."


def facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """A provenance as lines; what lies deeper than one level stays on its line."""
    lines = []
    for name, value in provenance.items():
        if isinstance(value, dict) and name not in APART:
            lines += [(f"{_name(name)}: {_name(key)}", _text(key, entry)) for key, entry in _kept(value)]
        elif name not in APART:
            lines.append((_name(name), _text(name, value)))
    return lines


def _kept(table: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in table.items() if key not in APART and value is not None]


def _name(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _text(key: str, value: Any) -> str:
    match value:
        case None | []:
            return UNKNOWN
        case bool():
            return "yes" if value else "no"
        case str():
            return Path(value).name if key == "questions" else value
        case int() if key.endswith("_bytes"):
            return human_bytes(value)
        case dict():
            return ", ".join(f"{_name(name)} {_text(name, entry)}" for name, entry in _kept(value))
        case list():
            return "; ".join(_text(key, entry) for entry in value)
        case _:
            return json.dumps(value)
