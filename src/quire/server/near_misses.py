"""What to say when a path is no route: the route that was probably meant, and the base URL that leads there."""

from collections.abc import Sequence
from difflib import get_close_matches

_MAX_PATH_CHARS = 256


def describe_miss(path: str, routes: Sequence[str]) -> str:
    """A sentence for a request of `path`, which none of `routes` has."""
    fixed = [route for route in routes if "{" not in route]
    wanted = path[:_MAX_PATH_CHARS].rstrip("/") or "/"
    for candidate in _spellings(wanted):
        if candidate in fixed:
            hint = "; clients usually need a base URL that ends in /v1" if candidate == f"/v1{wanted}" else ""
            return f"there is no route {wanted!a}; use {candidate}{hint}"
    if below := [route for route in fixed if route.startswith(f"{wanted}/")]:
        return f"{wanted!a} is a base URL, not a route; routes are {', '.join(below[:3])} and others. /docs lists them"
    close = get_close_matches(wanted, fixed, n=1, cutoff=0.75)
    return f"there is no route {wanted!a}; " + (f"did you mean {close[0]}? " if close else "") + "/docs lists them"


def _spellings(path: str) -> list[str]:
    """Other forms of `path` that clients with a wrong base URL or a habit from elsewhere send, likeliest first."""
    spellings = [f"/v1{path}", f"/api{path}"]
    parts = path.split("/")[1:]
    for start in range(1, len(parts)):
        rest = "/" + "/".join(parts[start:])
        spellings += [rest, f"/v1{rest}"]
    return [path, path.lower(), *spellings, *(spelling.lower() for spelling in spellings)]
