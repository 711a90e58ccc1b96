"""A run in words: what came out in a sentence or two, and what it comes from as names and values."""

import json
from typing import Any

from kangaroo.bench.results import Run
from kangaroo.bench.tables import UNKNOWN, span

APART = ("costs",)
"""Parts of a provenance that have a table of their own."""


def lead(run: Run) -> str:
    """What was asked, which method was fastest, and whether the answers are plain decoding's."""
    plain, methods = run.baseline, run.overall()
    asked = (
        f"{plain.questions} questions, {plain.answers} answers by each method, {plain.tokens:,} tokens by the baseline."
    )
    speed = f"Plain decoding: {plain.tokens_per_second:.1f} tokens/s."
    if not methods:
        return f"{asked} {speed}"
    best = max(methods, key=lambda summary: summary.speedup.value)
    return f"{asked} {speed} Fastest: {best.method}, {span(best.speedup)} times as fast. {_agreement(run)}"


def _agreement(run: Run) -> str:
    methods = run.overall()
    differing, ties = sum(len(s.differences) for s in methods), sum(s.ties for s in methods)
    if not differing:
        return "Every answer is plain decoding's, token by token."
    answers = sum(s.answers for s in methods)
    return f"Of {answers:,} answers {differing} differ from plain decoding's, {ties} of them by a tie in rounding."


def facts(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """A provenance as lines; what lies deeper than one level stays on its line."""
    lines = []
    for name, value in provenance.items():
        if name in APART:
            continue
        if isinstance(value, dict):
            lines += [(f"{_name(name)}: {_name(key)}", _text(entry)) for key, entry in value.items()]
        else:
            lines.append((_name(name), _text(value)))
    return lines


def _name(key: str) -> str:
    return key.replace("_", " ")


def _text(value: Any) -> str:
    if value is None or value == []:
        return UNKNOWN
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{_name(key)} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    return json.dumps(value)
