"""What happens while an answer is written: silence, failures, clients that leave or do not read, an orderly end."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from live import CLIENT, Live, serving
from stand_in import ScriptedEngine

from kangaroo.errors import CapacityError, QueueFull
from kangaroo.serve.app import Access

CHAT = "/v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@contextmanager
def scripted(*script: str | float | Exception, access: Access | None = None, drain: float = 0.0) -> Iterator[Live]:
    engine = ScriptedEngine(script)
    with serving(lambda: engine, access, drain=drain) as live:
        live.engine = engine  # type: ignore[attr-defined]
        yield live


def events(text: str) -> list[str]:
    return [block for block in text.split("\n\n") if block]


def test_a_silent_stream_shows_signs_of_life() -> None:
    with scripted("a", 1.0, "b", access=Access(keep_alive=0.1)) as live:
        found = events(CLIENT.post(live.url + CHAT, json=ASKED | {"stream": True}).text)
    assert 2 <= sum(event.startswith(":") for event in found) <= 10
    assert found[-1] == "data: [DONE]"


@pytest.mark.parametrize(("error", "status"), [(CapacityError("no memory"), 503), (RuntimeError("secret detail"), 500)])
def test_a_failure_after_the_first_byte_is_an_event(error: Exception, status: int) -> None:
    with scripted("a", error) as live:
        answer = CLIENT.post(live.url + CHAT, json=ASKED | {"stream": True})
        whole = CLIENT.post(live.url + CHAT, json=ASKED)
    found = events(answer.text)
    assert answer.status_code == 200
    assert found[-1] == "data: [DONE]"
    said = json.loads(found[-2].removeprefix("data: "))["error"]
    assert said["type"] == {503: "service_unavailable_error", 500: "internal_error"}[status]
    assert "secret" not in answer.text + whole.text
    assert whole.status_code == status
    assert whole.json()["error"]["type"] == said["type"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_noticed_at_once(stream: bool) -> None:
    with scripted("a", 30.0, "b") as live:
        with pytest.raises(httpx.ReadTimeout):
            CLIENT.post(live.url + CHAT, json=ASKED | {"stream": stream}, timeout=1)
        left = time.monotonic()
        live.wait_until(lambda: live.engine.tickets[0].cancelled_at is not None)
        assert live.engine.tickets[0].cancelled_at - left < 2, "nothing is sent for much longer"


@contextmanager
def posting(live: Live, body: bytes, length: int) -> Iterator[socket.socket]:
    """A connection on which a chat request has been sent, as far as `body` goes of `length` bytes."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {live.url[7:]}\r\nContent-Length: {length}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as connection:
        connection.sendall(head + body)
        yield connection


@contextmanager
def silent_reader(live: Live) -> Iterator[None]:
    """A client that has asked for a stream, which has begun, and reads nothing of it."""
    body = json.dumps(ASKED | {"stream": True}).encode()
    with posting(live, body, len(body)):
        live.wait_until(lambda: bool(live.engine.tickets))
        yield


def test_a_client_that_reads_nothing_holds_nobody_up_and_fills_no_memory() -> None:
    with scripted(*["x" * 50_000] * 400) as live:
        with silent_reader(live):
            stuck = live.engine.tickets[0]
            live.wait_until(lambda: stuck.stats.emitted > 0)
            taken = 0
            while taken < stuck.stats.emitted:
                taken = stuck.stats.emitted
                time.sleep(0.5)
            assert 0 < taken < 400, "it stops when the client does"
            live.engine.script = ["a"]
            assert CLIENT.post(live.url + CHAT, json=ASKED, timeout=5).status_code == 200
            assert stuck.stats.emitted == taken
        live.wait_until(lambda: stuck.cancelled_at is not None)


def test_a_client_that_reads_nothing_for_long_is_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kangaroo.serve.events.STALLED", 0.3)
    with scripted(*["x" * 50_000] * 400) as live, silent_reader(live):
        live.wait_until(lambda: live.engine.tickets[0].cancelled_at is not None)
        assert live.engine.tickets[0].completion is None


def test_a_body_that_does_not_arrive_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kangaroo.serve.app.STALLED", 0.3)
    with scripted("a") as live, posting(live, b"{", 100) as half:
        half.settimeout(5)
        assert half.recv(1000).startswith(b"HTTP/1.1 408")
        assert not live.engine.tickets


def test_a_full_queue_says_when_to_come_again() -> None:
    def full() -> list[str]:
        raise QueueFull("256 requests are waiting", 2.4)

    with scripted("a") as live:
        live.engine.script = full
        answer = CLIENT.post(live.url + CHAT, json=ASKED)
    assert answer.status_code == 429
    assert answer.headers["Retry-After"] == "3"
    assert answer.json()["error"]["code"] == "queue_full"


def test_all_answers_of_a_request_or_none() -> None:
    given = iter(["a", "b"])

    def scarce() -> list[str | float]:
        text = next(given, None)
        if text is None:
            raise QueueFull("full", 1)
        return [30.0, text]

    with scripted("a") as live:
        live.engine.script = scarce
        assert CLIENT.post(live.url + CHAT, json=ASKED | {"n": 3}).status_code == 429
        assert len(live.engine.tickets) == 2
        assert all(ticket.cancelled_at for ticket in live.engine.tickets)


def test_it_listens_while_it_loads_and_says_so() -> None:
    go = threading.Event()

    def load() -> ScriptedEngine:
        assert go.wait(20)
        return ScriptedEngine(["a"])

    with serving(load, wait=False) as live:
        health = CLIENT.get(live.url + "/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        early = CLIENT.post(live.url + CHAT, json=ASKED)
        assert early.status_code == 503
        assert early.json()["error"]["code"] == "loading"
        assert "Retry-After" in early.headers
        assert CLIENT.get(live.url + "/metrics").status_code == 200
        go.set()
        live.wait_until(lambda: CLIENT.get(live.url + "/health").status_code == 200)


def test_a_stopping_server_finishes_what_it_has_begun() -> None:
    found: list[httpx.Response] = []
    finished = threading.Event()
    with scripted("a", 0.6, "b", drain=5) as live:
        asking = threading.Thread(target=lambda: found.append(CLIENT.post(live.url + CHAT, json=ASKED)))
        asking.start()
        live.wait_until(lambda: bool(live.engine.tickets))
        live.engine.close = lambda seconds: finished.wait(20)
        live.stop(5)
        live.wait_until(lambda: CLIENT.get(live.url + "/health").json() == {"status": "draining"})
        late = CLIENT.post(live.url + CHAT, json=ASKED)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        asking.join()
        finished.set()
    assert found[0].json()["choices"][0]["message"]["content"] == "ab"


def test_a_half_open_connection_is_no_hindrance_to_others_nor_to_the_end() -> None:
    with scripted("a") as live:
        port = int(live.url.rpartition(":")[2])
        halves = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for half in halves:
            half.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert CLIENT.post(live.url + CHAT, json=ASKED).status_code == 200
        assert len(live.engine.tickets) == 1
        began = time.monotonic()
    assert time.monotonic() - began < 10
    for half in halves:
        half.close()
