"""The page for browsers: its files, and what a browser may do for it."""

from pathlib import Path

from starlette.responses import FileResponse, Response

from kangaroo.serve.refusals import Refusal

FOLDER = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page/page.css": "page.css", "/page/page.js": "page.js"}
"""Paths, and the files there: nothing else is loaded, from here or from elsewhere."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy: were the model's text ever taken for markup, it could neither run nor reach anything."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page(name: str) -> Response:
    """One of the page's files. Raises Refusal where they have not been installed."""
    file = FOLDER / name
    if not file.is_file():
        raise Refusal(404, "there is no page here: see /v1/models and /health")
    return FileResponse(file, headers=HEADERS)
