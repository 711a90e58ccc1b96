"""`make soak`: a live server under mixed load, a third of whose clients leave; every text must be the one it is alone.

Memory, threads and open files are watched meanwhile.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "serve")]

from live import Live, engine_of, serving  # noqa: E402

from held import Held, Watch  # noqa: E402
from kangaroo.decoder import Decoder, load  # noqa: E402
from kangaroo.machine import bound_kernel_caches  # noqa: E402
from kangaroo.sampling import Sampling  # noqa: E402
from little_model import FILES, TARGET  # noqa: E402

OPENINGS = ("Once upon a time", "Can you help me", "The train to Oakland", "I would like", "What is", "Yes, and")
DRAFTERS = ("kangaroo", "kangaroo+lookup", "prompt-lookup")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
RULES: tuple[dict[str, Any], ...] = (
    {"json": PERSON},
    {"choice": ["yes, gladly", "no, thank you", "perhaps"]},
    {"regex": "[A-Z][a-z]{2,9} (is|was) [a-z ]{3,20}[.]"},
)
SPARE_MEMORY, SPARE = 64 << 20, 8
"""Bytes that allocators may keep in a short run; threads and open files of pools that grow to their size."""


def kinds(chance: random.Random, count: int) -> list[dict[str, Any]]:
    """Bodies of requests: lengths, samplings and stops of many sorts."""
    found = []
    for _ in range(count):
        body: dict[str, Any] = {
            "prompt": " ".join(chance.choices(OPENINGS, k=chance.choice((1, 2, 5, 20)))),
            "max_tokens": chance.choice((1, 8, 24, 64, 120)),
            "temperature": chance.choice((0.0, 0.0, 0.7, 1.0, 1.4)),
            "seed": chance.randrange(2**32),
            "speculation": {"enabled": chance.random() < 0.8},
        }
        optional = {
            "top_p": 0.9,
            "top_k": 30,
            "min_p": 0.05,
            "presence_penalty": 0.6,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.2,
            "stop": ["\n", "the ", "?"],
            "ignore_eos": True,
            "min_tokens": 1,
            "logit_bias": {str(token): -5.0 for token in range(10, 40)},
            "n": 2,
        }
        body |= {name: value for name, value in optional.items() if chance.random() < 0.2}
        if chance.random() < 0.25:
            body |= {"structured_outputs": chance.choice(RULES), "min_tokens": 0}
            body.pop("ignore_eos", None)
        body["speculation"]["drafter"] = chance.choice(DRAFTERS)
        found.append(body)
    return found


def alone(decoder: Decoder, body: dict[str, Any]) -> list[str]:
    """The texts of a request that has the model to itself."""
    names = ("temperature", "seed", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
    given = {name: body[name] for name in (*names, "repetition_penalty") if name in body}
    bias = {int(token): value for token, value in body.get("logit_bias", {}).items()}
    others = {name: body[name] for name in ("max_tokens", "stop", "ignore_eos", "min_tokens", "n") if name in body}
    if rules := body.get("structured_outputs"):
        names = {"json": "json_schema", "choice": "choice", "regex": "regex"}
        others["processor"] = decoder.grammar(**{names[name]: rule for name, rule in rules.items()})
    answers = decoder.generate([body["prompt"]], sampling=Sampling(**given, logit_bias=bias), **others)
    return [answer.text for answer in answers]


@dataclass
class Tally:
    """What has come of the requests."""

    finished: list[tuple[int, list[str]]] = field(default_factory=list)
    """(which kind, its texts)."""
    left: int = 0
    refused: int = 0
    tokens: int = 0


async def ask(client: httpx.AsyncClient, url: str, kind: int, body: dict[str, Any], tally: Tally, leaves: bool) -> None:
    """One request, streamed or not; a client that `leaves` goes at a random moment."""
    chance = random.Random(time.monotonic_ns())
    stream, patience = chance.random() < 0.6, chance.random() ** 2 * 3 if leaves else 600.0
    texts = [""] * body.get("n", 1)
    try:
        async with asyncio.timeout(patience):
            if not stream:
                answer = await client.post(url, json=body)
                if answer.status_code == 429:
                    tally.refused += 1
                    return
                answer.raise_for_status()
                texts = [choice["text"] for choice in answer.json()["choices"]]
                tally.tokens += answer.json()["usage"]["completion_tokens"]
            else:
                body = body | {"stream": True, "stream_options": {"include_usage": True}}
                async with client.stream("POST", url, json=body) as answer:
                    answer.raise_for_status()
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            chunk = json.loads(line[6:])
                            assert "error" not in chunk, chunk
                            tally.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
                            for choice in chunk["choices"]:
                                texts[choice["index"]] += choice["text"]
    except TimeoutError:
        tally.left += 1
        return
    tally.finished.append((kind, texts))


async def drive(live: Live, bodies: list[dict[str, Any]], given: argparse.Namespace, watch: Watch) -> Tally:
    """All requests, so many at once."""
    chance, tally, began = random.Random(given.seed), Tally(), time.monotonic()

    def numbers() -> Iterator[int]:
        number = 0
        while number < given.requests if given.minutes is None else time.monotonic() < began + given.minutes * 60:
            yield number
            number += 1

    waiting = numbers()

    async def work(client: httpx.AsyncClient) -> None:
        for number in waiting:
            kind = chance.randrange(len(bodies))
            await ask(client, live.url + "/v1/completions", kind, bodies[kind], tally, chance.random() < 1 / 3)
            if number % 20 == 0:
                watch.look()
            if number % 100 == 99:
                status = live.service.status()
                print(f"{number + 1} asked; {watch.looks[-1].memory >> 20} MiB; {status}", flush=True)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(given.at_once)))
    return tally


def report(tally: Tally, watch: Watch, before: Held, seconds: float) -> None:
    """What it has come to; fails for what has grown."""
    done = len(tally.finished)
    print(f"{done} answered, {tally.left} clients left, {tally.refused} found the queue full; {seconds:.0f} s")
    print(f"{tally.tokens} tokens of answers, {tally.tokens / seconds:.0f} tokens/s")
    print(watch.check(before, spare_memory=SPARE_MEMORY, spare=SPARE))


def main() -> int:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="Instead of a number of requests.")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--kinds", type=int, default=100, help="Different requests.")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="little", help="'little', the tests' own, or one that `load` takes.")
    parser.add_argument("--adapter", help="Its adapter; 'demo' brings one.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bound_kernel_caches()  # as `kangaroo serve` does
    if given.model == "little":
        decoder = load(TARGET, adapter=FILES["adapter"], dtype="float32")
    else:
        decoder = load(given.model, adapter=given.adapter)
    print(f"{decoder}, exactness {decoder.target.exactness.level}")
    bodies, watch = kinds(random.Random(given.seed), given.kinds), Watch()
    with serving(engine_of(decoder, rows=given.rows, also=DRAFTERS[1:])) as live:
        httpx.post(live.url + "/v1/completions", json=bodies[0])
        before, began = watch.now(), time.monotonic()
        tally = asyncio.run(drive(live, bodies, given, watch))
        seconds = time.monotonic() - began
        live.wait_until(lambda: live.service.status().running == 0)  # type: ignore[union-attr]
        time.sleep(1)  # connections close
        report(tally, watch, before, seconds)
    plain = decoder.plain()
    wanted = {kind: alone(plain, bodies[kind]) for kind in {kind for kind, _ in tally.finished}}
    wrong = [kind for kind, texts in tally.finished if texts != wanted[kind]]
    ruled = sum("structured_outputs" in bodies[kind] for kind, _ in tally.finished)
    print(f"{ruled} of the answers followed a grammar")
    print(f"{len(tally.finished) - len(wrong)} of {len(tally.finished)} texts are those of the same request alone")
    for kind in wrong[:5]:
        print(f"differs: {json.dumps(bodies[kind])}")
    return 1 if wrong or not tally.finished else 0


if __name__ == "__main__":
    sys.exit(main())
