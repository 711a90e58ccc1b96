"""A server under load: how fast and how late its answers come when so many clients ask at once, drafting and not.

A client of the HTTP interface alone; the server may be anywhere. Levels of load run with speculation and without in
turn, on the same prompts, greedy, so that the texts can be compared.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kangaroo.bench.report.plots import WIDE, look
from kangaroo.bench.report.svg import draw
from kangaroo.chat import Messages
from kangaroo.checks import shown
from kangaroo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from httpx import AsyncClient
    from matplotlib.axes import Axes

PERCENTILES = (50, 90, 99)
NAMES = {True: "with speculation", False: "without"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of a server. Raises ConfigError for what cannot be."""

    url: str
    """Such as http://127.0.0.1:8123."""
    key: str | None = None
    conversations: Sequence[Messages]
    levels: Sequence[int]
    """How many clients ask at once."""
    requests: int
    """At every level; at least as many as there are clients."""
    max_tokens: int

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 1:
            raise ConfigError(f"clients at once must be at least 1, got {list(self.levels)}")
        if self.requests < 1 or self.max_tokens < 1:
            raise ConfigError("a load needs at least one request, of at least one token")
        if not self.conversations:
            raise DataError("there are no prompts")


@dataclass(slots=True)
class _Tally:
    """Of one level, in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: int = 0


def run_load(load: Load, report: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Every level with speculation and without: {"levels": [...], "identical", "compared"}; seconds, tokens.

    Raises ConfigError if the server does not answer, DataError if it refuses.
    """
    try:
        import httpx
    except ModuleNotFoundError:
        raise ConfigError("a load test needs httpx: pip install 'kangaroo-decoding[serve]'") from None
    try:
        port = httpx.URL(load.url).port
    except httpx.InvalidURL as error:
        raise ConfigError(f"{shown(load.url)} is no address of a server: {error}") from None
    if port is not None and not 0 < port < 2**16:
        raise ConfigError(f"{shown(load.url)} is no address of a server: there is no port {port}")
    try:
        return asyncio.run(_run(load, report))
    except httpx.HTTPStatusError as error:
        raise DataError(f"the server refuses: {error.response.text[:300]}") from None
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"no server answers at {load.url} ({reason}): start one with kangaroo serve") from None


async def _run(load: Load, report: Callable[[int, int], None]) -> dict[str, Any]:
    from httpx import AsyncClient, Limits

    headers = {} if load.key is None else {"Authorization": f"Bearer {load.key}"}
    levels, identical, compared = list[dict[str, Any]](), 0, 0
    total = len(load.levels) * 2
    async with AsyncClient(
        base_url=load.url, headers=headers, timeout=600, limits=Limits(max_connections=None)
    ) as client:
        for speculate in (True, False):  # what is slow only the first time
            await _ask(client, load, 0, _Tally(), speculate=speculate)
        # Prompts that a server keeps help whoever asks second: both find them kept, or neither.
        await _level(client, replace(load, max_tokens=1), max(load.levels), speculate=False)
        for at_once in load.levels:
            texts = list[dict[int, str]]()
            for speculate in (True, False):
                facts, tally = await _level(client, load, at_once, speculate=speculate)
                levels.append(facts)
                texts.append(tally.texts)
                report(len(levels), total)
            compared += len(texts[0])
            identical += sum(text == texts[1][number] for number, text in texts[0].items())
    return {"levels": levels, "identical": identical, "compared": compared}


async def _level(client: "AsyncClient", load: Load, at_once: int, *, speculate: bool) -> tuple[dict[str, Any], _Tally]:
    count, tally = max(load.requests, at_once), _Tally()
    waiting: Iterator[int] = iter(range(count))

    async def work() -> None:
        for number in waiting:
            await _ask(client, load, number, tally, speculate=speculate)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    seconds = time.perf_counter() - began
    facts = {
        "at_once": at_once,
        "speculation": speculate,
        "requests": count,
        "tokens": tally.tokens,
        "seconds": seconds,
        "tokens_per_second": tally.tokens / seconds,
        "time_to_first_token": _percentiles(tally.first),
        "time_per_token": _percentiles(tally.between),
        "whole": _percentiles(tally.whole),
    }
    return facts, tally


async def _ask(client: "AsyncClient", load: Load, number: int, tally: _Tally, *, speculate: bool) -> None:
    body = {
        "messages": load.conversations[number % len(load.conversations)],
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculation": {"enabled": speculate},
    }
    began, first, text, tokens = time.perf_counter(), None, "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.is_error:
            await answer.aread()
            answer.raise_for_status()
        async for chunk in _chunks(answer.aiter_lines()):
            content = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
            first = time.perf_counter() if content and first is None else first
            text += content or ""
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    ended = time.perf_counter()
    first = ended if first is None else first
    tally.first.append(first - began)
    tally.whole.append(ended - began)
    if tokens > 1:
        tally.between.append((ended - first) / (tokens - 1))
    tally.texts[number] = text
    tally.tokens += tokens


async def _chunks(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise DataError(f"the server broke an answer off: {chunk['error']['message']}")
            yield chunk


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    found = np.percentile(seconds, PERCENTILES) if seconds else [0.0] * len(PERCENTILES)
    return {f"p{which}": float(value) for which, value in zip(PERCENTILES, found, strict=True)}


def load_page(facts: dict[str, Any]) -> str:
    """A page of three drawings: throughput and latencies, by clients at once. Raises ConfigError without matplotlib."""
    panels: list[tuple[str, str, Callable[[dict[str, Any]], list[float]]]] = [
        ("throughput", "tokens per second, all clients together", lambda level: [level["tokens_per_second"]]),
        ("first", "seconds to the first token: p50, p99", lambda level: _ends(level["time_to_first_token"])),
        ("between", "seconds per further token: p50, p99", lambda level: _ends(level["time_per_token"])),
    ]
    drawings = [
        f"<h2>{label}</h2>" + draw(name, WIDE, 3.0, partial(_paint, levels=facts["levels"], value=value))
        for name, label, value in panels
    ]
    style = "svg{max-width:40rem;display:block}body{font-family:sans-serif}"
    return f'<!doctype html><meta charset="utf-8"><title>Load</title><style>{style}</style>' + "\n".join(drawings)


def _ends(percentiles: dict[str, float]) -> list[float]:
    return [percentiles["p50"], percentiles["p99"]]


def _paint(axes: "Axes", levels: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], list[float]]) -> None:
    for place, speculate in enumerate((True, False)):
        chosen, drawn = [level for level in levels if level["speculation"] == speculate], look(place)
        counts = [level["at_once"] for level in chosen]
        for which, series in enumerate(zip(*map(value, chosen), strict=True)):
            label = NAMES[speculate] if which == 0 else None
            axes.plot(
                counts,
                series,
                color=drawn.colour,
                marker=drawn.marker,
                linestyle=drawn.line,
                alpha=1 - which / 2,
                label=label,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([level["at_once"] for level in levels], [str(level["at_once"]) for level in levels])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients at once")
    axes.grid(axis="y")
    axes.legend()
