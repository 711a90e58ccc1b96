"""Who may ask: addresses that a browser was lured to, pages of other origins, and the API key. In plain ASGI."""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kangaroo.serve.browser import FILES
from kangaroo.serve.refusals import Refusal

OPEN = frozenset({"/health", *FILES})
"""Paths that need no key: whether the server lives, and the page, which asks for the key itself."""
LOCAL = ("localhost", "127.0.0.1", "::1")


class Guard:
    """Lets through what may pass, and refuses the rest before anything of its body is read."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Iterable[str] | None, origins: Sequence[str]):
        """`hosts` are the names this server goes by (None: any), `origins` those of pages that may use it."""
        self._app, self._key = app, None if key is None else _digest(key)
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] == "http":
            refusal = self.refusal(scope["path"], Headers(scope=scope))
            if refusal is not None:
                await refusal.response({"Connection": "close"})(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def refusal(self, path: str, headers: Headers) -> Refusal | None:
        """Why this request may not pass, if it may not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        # A page elsewhere may have its own name resolve to this machine, but cannot change the name it asks for.
        if self._hosts is not None and _name(f"//{host}") not in self._hosts:
            return Refusal(403, f"this server does not go by the name {host!r}: start it with --allow-host")
        if origin is not None and not self._same(origin, host):
            return Refusal(403, f"pages of {origin!r} may not use this server: start it with --allow-origin")
        if self._key is not None and path not in OPEN:
            given = headers.get("authorization", "")
            scheme, _, key = given.partition(" ")
            # Digests are of equal length, so that the time tells nothing of the key.
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
                said = "is wrong" if given else "is missing: send it as Authorization: Bearer KEY"
                return Refusal(401, f"the API key {said}", code="invalid_api_key")
        return None

    def _same(self, origin: str, host: str) -> bool:
        return bool({"*", origin} & self._origins) or urlsplit(origin).netloc.lower() == host.lower() != ""


def _name(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
