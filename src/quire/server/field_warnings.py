"""FieldWarnings: tells of request fields that Quire does not know: once in the log, and in a header each time."""

import logging
from dataclasses import dataclass, field

from quire.server.decoding import nearest_field

logger = logging.getLogger("quire.server")

MAX_LOGGED = 256
"""Most (route, field) pairs that are remembered and logged. Clients could otherwise fill the log."""


@dataclass(slots=True)
class FieldWarnings:
    """Remembers which unknown fields were logged."""

    _logged: set[tuple[str, str]] = field(default_factory=set)

    def note(self, route: str, body_type: type, names: list[str]) -> bytes:
        """Log each of `names` the first time that `route` gets it. Returns the value of the header x-quire-warning."""
        texts = [_describe(name, body_type) for name in names]
        for name, text in zip(names, texts, strict=True):
            if (route, name) not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add((route, name))
                logger.warning("%s: %s", route, text)
        return "; ".join(texts).encode("ascii")


def _describe(name: str, body_type: type) -> str:
    nearest = nearest_field(name, body_type)
    return f"unknown field {name!a} is ignored" + (f", the nearest known is {nearest}" if nearest else "")
