"""A server on a free port, in a thread of the test's own process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from kangaroo.engine import Engine
from kangaroo.serve.app import Access, make_app
from kangaroo.serve.run import Server, address_of, open_socket
from kangaroo.serve.service import Service

CLIENT = httpx.Client()


@dataclass
class Live:
    """A server that runs."""

    url: str
    service: Service
    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def stop(self, drain: float) -> None:
        """As a first SIGTERM would; returns at once."""
        self.loop.call_soon_threadsafe(self.server.stop, drain)

    def wait_until(self, holds: Callable[[], bool], seconds: float = 5.0) -> None:
        """Fail unless it holds before long."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it has not come about"
            time.sleep(0.005)


@contextmanager
def serving(
    load: Callable[[], Any], access: Access | None = None, *, drain: float = 0.0, wait: bool = True
) -> Iterator[Live]:
    """Serve what `load` makes while entered; with `wait`, from when it is loaded."""
    service = Service(load, "tiny")
    listening = open_socket("127.0.0.1", 0)
    server = Server(make_app(service, access, drain=drain), service, drain, last_words=1)
    loops: list[asyncio.AbstractEventLoop] = []
    loaded = threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve_until_stopped(listening, loaded.set)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    url = address_of(listening)
    thread.start()
    try:
        assert not wait or loaded.wait(60)
        while not server.started:
            time.sleep(0.005)
        yield Live(url, service, server, loops[0], thread)
    finally:
        if thread.is_alive():
            loops[0].call_soon_threadsafe(server.stop)
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"


def engine_of(decoder: Any, **options: Any) -> Callable[[], Engine]:
    """What loads an engine of this decoder."""
    return lambda: decoder.engine(**options)
