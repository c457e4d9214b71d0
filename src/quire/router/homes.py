"""Homes: which server keeps what a request refers to: files, batches, stored responses.

Servers do not share what they keep. Files and batches all go to one server, the first of the list that is up. A stored
response stays on the server that made it, and what continues it goes there.
"""

from collections import OrderedDict
from collections.abc import Iterable

from quire.router.requests import RoutedRequest

RESPONSES = "/v1/responses"
_KEPT_TOGETHER = ("/v1/files", "/v1/batches")
_MAX_ENTRIES = 2**17


class Homes:
    """Bounded: of stored responses the oldest are forgotten first."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, str] = OrderedDict()
        """Id → server."""

    def of(self, request: RoutedRequest, servers: Iterable[str]) -> str | None:
        """The server that a request must go to; None if any will do. `servers` take requests, in the list's order."""
        if request.path.startswith(_KEPT_TOGETHER):
            return next(iter(servers), None)
        if request.path == RESPONSES:
            return self._responses.get(str(request.fields.get("previous_response_id")))
        if request.path.startswith(f"{RESPONSES}/"):
            return self._responses.get(request.path.split("/")[3])
        return None

    def note(self, request: RoutedRequest, server: str) -> None:
        """A server answers a request: what it makes stays there."""
        if request.method == "POST" and request.path == RESPONSES:
            self._responses[f"resp_{request.stream_id}"] = server
            while len(self._responses) > _MAX_ENTRIES:
                self._responses.popitem(last=False)
