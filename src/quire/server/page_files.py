"""The page at /: the files of the folder `page`, as public endpoints. The page uses public endpoints only.

It has no build step and loads nothing from other servers. Its policy lets it run its own files and reach this server,
and forbids to make HTML of texts. Its URLs are relative, so it works behind a prefix.
"""

import hashlib
from pathlib import Path

from quire.server.endpoint import Endpoint, RequestContext

FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".json": b"application/json",
    ".svg": b"image/svg+xml",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    b"trusted-types 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # A browser keeps the files and asks with their ETag whether they are still the same.
    (b"cache-control", b"no-cache"),
)


def endpoints() -> tuple[Endpoint, ...]:
    """One endpoint for each file; index.html is /."""
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in _TYPES)
    return tuple(_endpoint(path) for path in files)


def _endpoint(path: Path) -> Endpoint:
    content, content_type = path.read_bytes(), _TYPES[path.suffix]
    etag = b'"' + hashlib.sha256(content).hexdigest()[:32].encode() + b'"'
    headers = (*_HEADERS, (b"etag", etag))

    async def get_file(context: RequestContext) -> None:
        known = dict(context.scope["headers"]).get(b"if-none-match", b"")
        if etag in known or known.strip() == b"*":
            await context.send({"type": "http.response.start", "status": 304, "headers": [*headers]})
            await context.send({"type": "http.response.body", "body": b""})
        else:
            await context.reply_bytes(content, content_type, headers=headers)

    route = "/" if path.name == "index.html" else f"/page/{path.name}"
    return Endpoint("GET", route, get_file, "The page", public=True)
