"""Running the server: a socket, signals, an orderly end."""

import asyncio
import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kangaroo.engine import Engine
from kangaroo.errors import ConfigError
from kangaroo.inputs import read_text
from kangaroo.serve.events import STALLED
from kangaroo.serve.service import Service

MOST_CONNECTIONS = 1024
"""Beyond which new requests are answered with 503, before anything of them is read."""
LAST_WORDS = 5
"""Seconds in which responses must have been sent once all requests are finished."""


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError for an address that cannot be had."""
    if not 0 <= port < 65536:
        raise ConfigError(f"--port must be in 0..65535, got {port}")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = places[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host!r}: {error.strerror}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else clients that neither read nor close keep their sockets
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED * 1000))
        found.bind(address)
        found.listen(256)
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return found


def address_of(listening: socket.socket) -> str:
    """The server's address, as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_key(path: Path) -> str:
    """The API key in a file that only its owner can read. Raises ConfigError for any other."""
    text = read_text(path, "API key file", ConfigError).strip()
    if os.name == "posix" and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others can read the API key in {path}: chmod 600 {path}")
    return check_key(text, str(path))


def check_key(key: str, where: str) -> str:
    """The key, if a header can carry it. Raises ConfigError, which begins with `where`, for one that is none."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: an API key is one word of printable ASCII characters")
    return key


class Server(uvicorn.Server):
    """A server that finishes what it has begun when it is told to stop; told again, it stops at once."""

    def __init__(
        self, app: FastAPI, service: Service, drain: float, *, access_log: bool = False, last_words: int = LAST_WORDS
    ):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="info" if access_log else "warning",
                access_log=access_log,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=last_words,
                server_header=False,
                ws="none",
            )
        )
        self._service, self._drain, self._signals = service, drain, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = set[asyncio.Task[None]]()

    async def serve_until_stopped(self, listening: socket.socket, ready: Callable[[], None]) -> None:
        """Serve until a signal has come and requests are finished; call `ready` once the model is loaded.

        Raises what loading raises.
        """
        self._loop = asyncio.get_running_loop()
        loading = self._service.start()
        loading.add_done_callback(lambda done: self._loaded(done, ready))
        await self.serve(sockets=[listening])
        if not loading.done():
            # A thread that computes cannot be ended, and the interpreter would wait for it.
            os._exit(128 + signal.SIGINT)
        loading.result()

    def _loaded(self, done: "asyncio.Future[Engine]", ready: Callable[[], None]) -> None:
        if done.cancelled() or done.exception() is not None:
            self.should_exit = True
        else:
            ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn calls it on SIGINT and SIGTERM: the first finishes requests, the second breaks them off."""
        self._signals += 1
        if self._loop is not None and self._service.state in ("ready", "draining") and self._signals <= 2:
            self._loop.call_soon_threadsafe(self.stop, self._drain if self._signals == 1 else 0.0)
        else:
            self.should_exit, self.force_exit = True, self._signals > 1

    def stop(self, drain: float = 0.0) -> None:
        """Give requests so many seconds to finish, then end. For the event loop's thread."""
        self._stopping.add(asyncio.create_task(self._drain_and_end(drain)))

    async def _drain_and_end(self, drain: float) -> None:
        await self._service.drain(drain)
        self.should_exit = True


def run(
    app: FastAPI,
    service: Service,
    listening: socket.socket,
    drain: float,
    *,
    ready: Callable[[], None],
    access_log: bool = False,
) -> None:
    """Serve on the socket until told to stop. Raises what loading the model raises."""
    server = Server(app, service, drain, access_log=access_log)
    with contextlib.closing(listening):
        asyncio.run(server.serve_until_stopped(listening, ready))
