"""`kangaroo serve` as a process: signals, and what is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from chat_model import save_chat_model

pytestmark = pytest.mark.slow
LONG = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True, "temperature": 0, "n": 4}
"""Answers one after the other, so that they take longer than whatever keeps the test from looking."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


@contextmanager
def process(folder: Path, *options: str, loaded: bool = True) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server, and its address."""
    command = [sys.executable, "-c", "import kangaroo_command; kangaroo_command.main()", "serve", "--port", "0"]
    command += [
        "--model",
        str(folder / "target"),
        "--adapter",
        str(folder / "adapter"),
        "--threads",
        "1",
        "--rows",
        "1",
    ]
    command += options
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        found = re.search(r"http://[\d.:]+", child.stderr.readline())
        assert found, "it says where it listens"
        if loaded:
            assert "ready" in child.stderr.readline()
        yield child, found[0]
    finally:
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()


def ended(child: "subprocess.Popen[str]") -> str:
    """What it has said, once it has ended in good order; the interpreter itself may take long on a busy machine."""
    _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said
    assert "Traceback" not in said
    return said


def texts(answer: httpx.Response) -> Iterator[str]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            yield chunk["error"]["code"] if "error" in chunk else chunk["choices"][0]["text"]
        elif line:
            yield line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_finishes_what_has_begun(folder: Path, number: signal.Signals) -> None:
    with (
        process(folder, "--drain", "60") as (child, url),
        httpx.stream("POST", url + "/v1/completions", json=LONG, timeout=60) as answer,
    ):
        pieces = texts(answer)
        next(pieces)
        os.kill(child.pid, number)
        time.sleep(0.3)
        assert httpx.get(url + "/health").json() == {"status": "draining"}
        assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 503
        rest = list(pieces)
        assert rest[-1] == "data: [DONE]"
        assert "draining" not in rest
        ended(child)


@pytest.mark.parametrize("again", [False, True])
def test_a_second_signal_or_the_end_of_the_time_breaks_off(folder: Path, again: bool) -> None:
    with (
        process(folder, "--drain", "60" if again else "0.2") as (child, url),
        httpx.stream("POST", url + "/v1/completions", json=LONG, timeout=60) as answer,
    ):
        pieces = texts(answer)
        next(pieces)
        began = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        if again:
            time.sleep(0.1)
            os.kill(child.pid, signal.SIGTERM)
        assert list(pieces)[-2:] == ["draining", "data: [DONE]"]
        assert time.monotonic() - began < 10
        ended(child)


def test_a_server_that_still_loads_ends_at_once(folder: Path) -> None:
    with process(folder, loaded=False) as (child, url):
        child.send_signal(signal.SIGTERM)
        child.wait(20)
        assert "Traceback" not in child.communicate()[1]
    assert url
