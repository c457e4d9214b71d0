"""ClientAnswer: the response to a client, written in parts by one server after the other."""

import msgspec
from starlette.types import Send

from quire.errors import RequestError
from quire.server.errors import error_body

Headers = list[tuple[bytes, bytes]]

_encode = msgspec.json.Encoder().encode


class ClientAnswer:
    """Use it once: `begin`, then `write` any number of times, then `end`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False
        """The client has the status and the headers: nothing can take them back."""
        self.is_unmarked = False
        """The client has bytes without marks: no other server can go on with them."""

    async def begin(self, status: int, headers: Headers, replica: str) -> None:
        self.has_begun = True
        headers = [*headers, (b"x-quire-replica", replica.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data})


def failure_event(path: str, error: RequestError) -> bytes:
    """An error inside a stream, as the endpoint at `path` writes it."""
    body = error_body(error)
    if path.startswith("/api/"):
        return _encode({"error": error.message}) + b"\n"
    if path.startswith("/v1/messages"):
        content = {"type": "error", "error": {"type": "overloaded_error", "message": error.message}}
        return b"event: error\ndata: " + _encode(content) + b"\n\n"
    if path.startswith("/v1/responses"):
        item = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return b"event: error\ndata: " + _encode(item) + b"\n\n"
    return b"data: " + _encode(body) + b"\n\ndata: [DONE]\n\n"
