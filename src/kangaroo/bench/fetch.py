"""A file's bytes, from the disk or from the web."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from kangaroo.errors import DataError

TIMEOUT = 60
"""Seconds without an answer."""


def fetch(name: str) -> bytes:
    """The content of a file, or of what an http(s) address leads to, which is kept in memory only.

    Raises DataError if there is none.
    """
    if name.startswith(("http://", "https://")):
        return _download(name)
    path = Path(name)
    if not path.is_file():
        raise DataError(f"no file at {name}: expected one, or an address that begins with http:// or https://")
    return path.read_bytes()


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
            return content
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise DataError(f"cannot fetch {address}: {error}") from None
