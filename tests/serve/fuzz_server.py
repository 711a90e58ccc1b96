"""`make fuzz-server`: requests of every kind to a live server, from its own schema, from likely bodies and from damage.

Each is answered or refused: no 500, no hang. Afterwards the server still answers as it did, and nothing is left behind.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "fuzz")]

from live import Live, engine_of, serving  # noqa: E402
from values import changed, damaged, like_number, texts, to_json, values  # noqa: E402

from chat_model import SENTENCES, save_chat_model  # noqa: E402
from held import Watch  # noqa: E402
from kangaroo.decoder import load  # noqa: E402
from kangaroo.serve.app import Access, make_app  # noqa: E402
from kangaroo.serve.protocol import REFUSED, ChatRequest, TextRequest  # noqa: E402
from kangaroo.serve.service import Service  # noqa: E402

AT_ONCE, PATIENCE = 8, 120
"""Requests at once, and seconds that one may take: others may be using the machine."""
ALLOWED = {200, 400, 404, 405, 413, 429}
PART = 1000
"""Requests that are drawn together."""
LARGEST, SPARE_MEMORY = 200_000, 128 << 20
"""Bytes of a body, and of memory that what draws the requests may keep."""
KNOWN = {"prompt": "Where would you", "max_tokens": 30, "temperature": 0}
PATHS = ("/v1/chat/completions", "/v1/completions")


class Sent(NamedTuple):
    """A request, however it was drawn."""

    what: str
    send: Callable[[httpx.Client, str], httpx.Response]


def _post(path: str, content: bytes) -> Sent:
    def send(client: httpx.Client, url: str) -> httpx.Response:
        return client.post(url + path, content=content, headers={"Content-Type": "application/json"})

    return Sent(f"POST {path} {content[:2000]!r}", send)


def _call(case: schemathesis.Case) -> Sent:
    def send(client: httpx.Client, url: str) -> httpx.Response:
        answer = case.call(base_url=url, timeout=PATIENCE)
        return httpx.Response(answer.status_code, content=answer.content)

    return Sent(f"{case.method} {case.formatted_path} {str(case.body)[:2000]}", send)


def from_schema() -> st.SearchStrategy[Sent]:
    """What the schema allows, and what it does not."""
    schema = schemathesis.openapi.from_dict(make_app(Service(lambda: None, "tiny")).openapi())
    modes = list(schemathesis.GenerationMode)
    operations = [found.ok() for found in schema.get_all_operations()]
    return st.one_of([each.as_strategy(mode) for each in operations if each for mode in modes]).map(_call)


short = st.sampled_from([*SENTENCES[:3], "Where", "", "é", "\0", "x" * 700])


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any] = like_number) -> st.SearchStrategy[Any]:
    """What is meant, and now and then what is not."""
    return st.integers(0, 7).flatmap(lambda which: wrong if which == 7 else right)


SCHEMAS = st.sampled_from(
    [{"type": "object"}, {"type": "integer"}, {"enum": ["a", "b"]}, {"type": "string", "maxLength": 5}]
)
RULES: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": mostly(st.integers(1, 30)),
    "min_tokens": mostly(st.integers(0, 5)),
    "temperature": mostly(st.floats(0, 2)),
    "top_p": mostly(st.floats(0.01, 1)),
    "top_k": mostly(st.integers(0, 20)),
    "min_p": mostly(st.floats(0, 1)),
    "presence_penalty": mostly(st.floats(-2, 2)),
    "frequency_penalty": mostly(st.floats(-2, 2)),
    "repetition_penalty": mostly(st.floats(0.5, 2)),
    "seed": mostly(st.integers(0, 9)),
    "n": mostly(st.integers(1, 3)),
    "stop": mostly(short | st.lists(texts, max_size=3), values),
    "stop_token_ids": mostly(st.lists(st.integers(0, 299), max_size=3), values),
    "ignore_eos": mostly(st.booleans(), values),
    "logit_bias": mostly(st.dictionaries(st.integers(0, 299).map(str), st.floats(-100, 100), max_size=3), values),
    "stream": st.booleans(),
    "stream_options": mostly(st.fixed_dictionaries({"include_usage": st.booleans()}), values),
    "speculation": mostly(
        st.fixed_dictionaries(
            {},
            optional={
                "enabled": st.booleans(),
                "statistics": st.booleans(),
                "tokens": st.booleans(),
                "drafter": mostly(st.sampled_from(["kangaroo", "prompt-lookup", "early-exit", None]), texts),
                "max_draft": mostly(st.integers(1, 4)),
            },
        ),
        values,
    ),
    "response_format": mostly(
        SCHEMAS.flatmap(lambda schema: mostly(st.just(schema), changed(schema))).map(
            lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        ),
        values,
    ),
    "structured_outputs": mostly(
        st.sampled_from(["[ab]+", "(", "a{1000}"]).map(lambda regex: {"regex": regex})
        | st.lists(short, max_size=3).map(lambda choice: {"choice": choice}),
        values,
    ),
    "logprobs": st.booleans() | st.integers(0, 6),
    "top_logprobs": st.integers(0, 6),
}
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": short | texts}),
    min_size=1,
    max_size=3,
)
PROMPT = short | st.lists(short, min_size=1, max_size=3) | st.lists(st.integers(0, 299), min_size=1, max_size=6)
FIELDS = sorted({*ChatRequest.model_fields, *TextRequest.model_fields, *REFUSED})


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """What clients may well send, and now and then what they should not."""
    path = draw(st.sampled_from(PATHS))
    names = draw(st.lists(st.sampled_from(sorted(RULES)), max_size=4, unique=True))
    body: dict[str, Any] = {"max_tokens": 12} | {name: draw(RULES[name]) for name in names}
    body |= (
        {"messages": draw(mostly(MESSAGES, values))} if path == PATHS[0] else {"prompt": draw(mostly(PROMPT, values))}
    )
    if draw(st.integers(0, 7)) == 7:
        body[draw(st.sampled_from(FIELDS))] = draw(values)
    return path, body


def requests() -> st.SearchStrategy[Sent]:
    """All kinds."""
    whole = bodies().map(lambda drawn: (drawn[0], to_json(drawn[1]).encode()))
    broken = whole.flatmap(lambda drawn: damaged(drawn[1]).map(lambda content: _post(drawn[0], content)))
    raw = st.tuples(st.sampled_from(PATHS), st.binary(max_size=60)).map(lambda drawn: _post(*drawn))
    likely = whole.map(lambda drawn: _post(*drawn))
    others = st.one_of(from_schema(), broken, raw)
    return st.integers(0, 3).flatmap(lambda which: others if which == 3 else likely)


def check(sent: Sent, answer: httpx.Response) -> None:
    """It was answered, or refused in the shape that clients read."""
    assert answer.status_code in ALLOWED, f"{answer.status_code} {answer.text[:500]} for {sent.what}"
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, sent.what
        assert error["message"], sent.what
        assert len(error["message"]) < 3000, sent.what
        assert "\n" not in error["message"].strip(), sent.what
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
        assert answer.text.endswith("data: [DONE]\n\n"), sent.what
        codes = [event["error"]["type"] for event in events if "error" in event]
        assert "internal_error" not in codes, f"{codes} for {sent.what}"


class Fuzz:
    """Requests to one server, and what has become of them."""

    def __init__(self, live: Live):
        self.live, self.statuses = live, Counter[int]()
        self._client = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_connections=AT_ONCE))
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self.watch = Watch()

    def run(self, count: int, number: int | None) -> None:
        """So many requests; the same ones every time for a `number` of None."""

        @settings(
            max_examples=-(-count // AT_ONCE),
            deadline=None,
            database=None,
            derandomize=number is None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(requests(), min_size=AT_ONCE, max_size=AT_ONCE))
        def attempt(group: list[Sent]) -> None:
            answers = list(self._pool.map(lambda sent: sent.send(self._client, self.live.url), group))
            for sent, answer in zip(group, answers, strict=True):
                check(sent, answer)
            self.statuses.update(answer.status_code for answer in answers)
            self.watch.look()

        (attempt if number is None else seed(number)(attempt))()

    def known(self) -> str:
        """What the server says to something that is always the same."""
        answer = self._client.post(self.live.url + PATHS[1], json=KNOWN)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def settle(self) -> None:
        """Wait until nothing is under way."""
        status = self.live.service.status
        self.live.wait_until(lambda: (status().running, status().waiting) == (0, 0), PATIENCE)  # type: ignore[union-attr]
        self._client.close()
        self._client = httpx.Client(timeout=PATIENCE)
        time.sleep(0.5)


def fuzz(count: int, number: int | None) -> list[str]:
    """All of it, on a little model; returns what to say of it."""
    with tempfile.TemporaryDirectory() as folder:
        place = save_chat_model(Path(folder))
        decoder = load(place / "target", adapter=place / "adapter", dtype="float32")
        make = engine_of(decoder, rows=AT_ONCE, capacity=64, also=["prompt-lookup", "early-exit"])
        with serving(make, Access(largest_body=LARGEST)) as live:
            run = Fuzz(live)
            run.run(AT_ONCE, None)  # whatever is made only once
            text = run.known()
            run.settle()
            before = run.watch.now()
            began = time.monotonic()
            for first in range(0, count, PART):  # what has been drawn is kept to the end of a part
                run.run(min(PART, count - first), None if number is None else number + first)
            seconds = time.monotonic() - began
            run.settle()
            held = run.watch.check(before, spare_memory=SPARE_MEMORY, spare=AT_ONCE)
            assert run.known() == text, "the server no longer answers as it did"
            said = ", ".join(f"{count} x {status}" for status, count in sorted(run.statuses.items()))
            total = run.statuses.total()
            return [f"{total:,} requests in {seconds:.0f} s: {said}", held]


def main() -> None:
    """As from a shell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(fuzz(chosen.requests, chosen.seed)))


if __name__ == "__main__":
    main()
