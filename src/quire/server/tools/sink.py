"""Sink: takes the calls that a parser finds. NotACallError: what looked like a call is text."""

from typing import Protocol

from quire.server.tools.request import Tool


class NotACallError(Exception):
    """What looked like a call is text. Raised only before the call has begun; the reader then shows that text."""


class Sink(Protocol):
    """Takes the calls. It knows the tools and decodes marks."""

    def begin(self, name: str, call_id: str = "", *, known_only: bool = False) -> Tool | None:
        """A call begins; returns the tool. Raises `NotACallError` for a name that cannot be a tool's.

        `known_only` takes only the names of the client's tools.
        """
        ...

    def arguments(self, text: str) -> None: ...
    def end(self) -> None: ...
