"""FieldWarnings: logs once what of requests has no effect, above all fields that Quire does not know."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from quire.server.decoding import nearest_field

logger = logging.getLogger("quire.server")

MAX_LOGGED = 256
"""Most (route, warning) pairs that are remembered and logged. Clients could otherwise fill the log."""


@dataclass(slots=True)
class FieldWarnings:
    """Remembers what was logged."""

    _logged: set[tuple[str, str]] = field(default_factory=set)

    def log(self, route: str, texts: Iterable[str]) -> None:
        """Log each text the first time that `route` gives cause for it."""
        for text in texts:
            if (route, text) not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add((route, text))
                logger.warning("%s: %s", route, text)

    @staticmethod
    def describe(body_type: type, names: Iterable[str]) -> list[str]:
        """A warning for each unknown field of `names`, with the nearest field of `body_type`."""
        return [_describe(name, body_type) for name in names]


def _describe(name: str, body_type: type) -> str:
    nearest = nearest_field(name, body_type)
    return f"unknown field {name!a} is ignored" + (f", the nearest known is {nearest}" if nearest else "")
