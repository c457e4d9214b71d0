"""Parameters behind the question mark of a path, checked."""

from collections.abc import Mapping

from quire.errors import RequestError


def read_whole_number(query: Mapping[str, str], name: str, default: int, *, low: int, high: int) -> int:
    """The number in the parameter `name`, or `default` without one. Raises `RequestError` outside `low` to `high`."""
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 12 or not low <= int(text) <= high:
        raise RequestError(f"{name} is {text[:50]!r}; it must be a whole number from {low} to {high}", param=name)
    return int(text)


def read_ascending(query: Mapping[str, str]) -> bool:
    """Whether the parameter `order` is asc; desc is the default. Raises `RequestError` for any other text."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order is {order[:50]!r}; supported: asc, desc", param="order")
    return order == "asc"
