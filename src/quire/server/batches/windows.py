"""Completion windows: how long a batch may take, "24h" or another number of minutes, hours or days."""

import re

from quire.server.errors import Refusal

_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_MAX_DAYS = 30


def parse_window(text: str) -> int:
    """Seconds. Raises `Refusal` (400) for a text that is no window, or one of more than 30 days."""
    match = re.fullmatch(r"(\d{1,5})([mhd])", text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= _MAX_DAYS * 86400:
        raise Refusal(
            400,
            f"completion_window is {text[:50]!r}; give minutes, hours or days up to {_MAX_DAYS}d, such as 24h",
            code="invalid_window",
            param="completion_window",
        )
    return seconds
