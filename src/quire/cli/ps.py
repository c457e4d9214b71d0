"""`quire ps`: the unfinished requests of a running server, and the memory they hold."""

import asyncio
from typing import Annotated

import msgspec
from cyclopts import Parameter

from quire.cli.http_client import HttpError, server_target
from quire.outputs import MemoryReport, RequestMemory

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, Parameter(name="--url")]
ApiKey = Annotated[str | None, Parameter(name="--api-key", env_var="QUIRE_API_KEY")]
AsJson = Annotated[bool, Parameter(name="--json", negative=())]


def ps(*, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the requests that a running server computes, and the memory they hold.

    Parameters
    ----------
    url
        The server.
    api_key
        The server's API key. A key that is no admin's lists its own requests.
    as_json
        Print the server's report as JSON.
    """
    body = asyncio.run(server_target(url, "/kv", api_key).get())
    print(body.decode() if as_json else describe_report(body))


def describe_report(body: bytes) -> str:
    """The memory report as a table; only rows of requests where the server shows no more. Raises `HttpError`."""
    try:
        parts = msgspec.json.decode(body)
        if "stats" in parts:
            return str(msgspec.convert(parts, MemoryReport))
        requests = msgspec.convert(parts["requests"], list[RequestMemory])
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, TypeError) as error:
        raise HttpError(f"the server's answer is no memory report: {' '.join(str(error).split())[:200]}") from None
    if not requests:
        return "no request of this key is unfinished"
    states = ["running" if request.running else "waiting" for request in requests]
    return "\n".join(
        f"{request.request_id}  {state}  {request.num_tokens} tokens in {request.num_blocks} blocks, "
        f"{request.waste:.1%} wasted"
        for request, state in zip(requests, states, strict=True)
    )
