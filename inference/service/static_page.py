"""The chat page: the files of `page/`, and nothing else, at `/`.

    add_page(app)

They are read once. A browser is told to run, load and send nothing but what comes from and goes to this service, so
that even a fault in the page would let no text of a model do anything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`; it is no part of the OpenAPI document."""
    for path in sorted(FOLDER.iterdir()):
        address = "/" if path.name == "index.html" else f"/{path.name}"
        app.add_api_route(address, _reply_with(path), methods=["GET", "HEAD"], include_in_schema=False)


def _reply_with(path: Path):  # noqa: ANN202 (an endpoint)
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**SECURITY_HEADERS, "ETag": tag, "Cache-Control": "no-cache"}  # asked for each time, sent after a change

    async def reply(request: Request) -> Response:
        if request.headers.get("If-None-Match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=MEDIA_TYPES[path.suffix], headers=headers)

    return reply
