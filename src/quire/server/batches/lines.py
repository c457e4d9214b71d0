"""Reading input files: JSON lines, each one request."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from quire.server.batches.objects import InputLine, LineError

MAX_LINES = 50_000
MAX_ERRORS = 100
"""Most faults of one file that are reported."""

_decoder = msgspec.json.Decoder(InputLine)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank; numbers count all lines from 1."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line := line.strip():
                yield number, line


def parse_line(line: bytes) -> InputLine:
    """Raises `msgspec.MsgspecError` or `UnicodeDecodeError` for a line that is no request."""
    return _decoder.decode(line)


def check_lines(path: Path, endpoint: str) -> tuple[int, list[LineError]]:
    """The number of requests in a file, and its faults: nothing of a file with a fault is answered."""
    errors: list[LineError] = []
    seen: set[str] = set()
    count = 0
    for number, line in read_lines(path):
        count += 1
        if len(errors) >= MAX_ERRORS:
            break
        if count > MAX_LINES:
            message = f"the file has more than {MAX_LINES} requests; split it"
            return count, [LineError("too_many_requests", message)]
        if error := _check(line, number, endpoint, seen):
            errors.append(error)
    if not count:
        errors.append(LineError("empty_file", "the file has no request"))
    return count, errors


def _check(line: bytes, number: int, endpoint: str, seen: set[str]) -> LineError | None:
    try:
        request = parse_line(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        reason, _, place = str(error).partition(" - at `$")
        name = place.strip(".`") or None
        return LineError("invalid_json_line", f"{name or 'the line'}: {reason}", number, name)
    if request.url != endpoint:
        message = f"url is {request.url[:100]!r}; the batch's endpoint is {endpoint!r}"
        return LineError("mismatched_endpoint", message, number, "url")
    if not bytes(request.body).startswith(b"{"):
        return LineError("invalid_body", "body is not an object", number, "body")
    if request.custom_id in seen:
        message = f"custom_id {request.custom_id[:100]!r} is there twice; answers could not be matched to requests"
        return LineError("duplicate_custom_id", message, number, "custom_id")
    seen.add(request.custom_id)
    return None
