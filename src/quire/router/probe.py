"""Questions of the router itself to a server: short answers in a short time, whatever the server does."""

import asyncio

import httpx
import msgspec
from msgspec import Struct

from quire.errors import ConfigError
from quire.server.handover import PROMPT_HEADER, PromptBlocks

PROBE_SECONDS = 2.0
"""Longest time that a server may take to say how it is."""
_MAX_BYTES = 2**20
"""Longest answer that is read."""
_NOT_NOW = (408, 429, 502, 503, 504)
_CLOSED = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)


class NoAnswerError(Exception):
    """A server did not answer in time, or not in HTTP."""

    def __init__(self, error: Exception) -> None:
        text = str(error)
        hint = "; give the file of its certificate with --backend-ca-file" if "CERTIFICATE_VERIFY" in text else ""
        super().__init__(f"it does not answer ({type(error).__name__}{': ' + text[:200] if text else ''}){hint}")
        self.was_refused = isinstance(error, httpx.ConnectError)
        """Nothing listens there: no need to ask again."""


class Answer(Struct):
    """What a server said."""

    status: int
    content: bytes


class Introduction(Struct):
    """What a server is."""

    models: tuple[str, ...]
    block_size: int = 0
    """0 for a server that is not Quire."""
    version: str = ""


class _ModelCard(Struct):
    id: str
    owned_by: str | None = None


class _ModelList(Struct):
    data: list[_ModelCard]


class _Health(Struct):
    status: str = ""


async def probe(
    client: httpx.AsyncClient,
    url: str,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: object = None,
    seconds: float | None = None,
) -> Answer:
    """The answer at `url`. A kept connection may be closed by now: then a new one is tried. Raises `NoAnswerError`."""
    try:
        async with asyncio.timeout(PROBE_SECONDS if seconds is None else seconds):
            try:
                return await _ask(client, method, url, headers, body)
            except _CLOSED:
                return await _ask(client, method, url, headers, body)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise NoAnswerError(error) from error


async def _ask(
    client: httpx.AsyncClient, method: str, url: str, headers: dict[str, str] | None, body: object
) -> Answer:
    given = {"accept-encoding": "identity", **(headers or {})}
    content = None if body is None else msgspec.json.encode(body)
    if content is not None:
        given["content-type"] = "application/json"
    async with client.stream(method, url, headers=given, content=content) as response:
        parts, size = [], 0
        async for part in response.aiter_raw():
            parts.append(part)
            size += len(part)
            if size > _MAX_BYTES:
                raise httpx.RemoteProtocolError(f"its answer is longer than {_MAX_BYTES} bytes")
        return Answer(response.status_code, b"".join(parts))


def key_header(api_key: str | None) -> dict[str, str]:
    """The header that shows an API key."""
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def health_status(answer: Answer) -> str:
    """What /health says in words; empty for a server that says nothing."""
    try:
        return msgspec.json.decode(answer.content, type=_Health).status
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


async def introduce(client: httpx.AsyncClient, url: str, api_key: str | None) -> Introduction | None:
    """What the server at `url` is; None if it wants another API key.

    Raises `ConfigError` with the reason if it does not say, and `NoAnswerError`.
    """
    headers = key_header(api_key)
    listed = await probe(client, f"{url}/v1/models", headers=headers)
    if listed.status in (401, 403):
        return None
    try:
        cards = msgspec.json.decode(listed.content, type=_ModelList).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"its /v1/models is no list of models (status {listed.status})") from None
    if not cards:
        raise ConfigError("its /v1/models lists no model")
    models = tuple(card.id for card in cards)
    if cards[0].owned_by not in ("quire", None):  # another engine would compute an answer
        return Introduction(models)
    body = {"model": models[0], "prompt": [1], "max_tokens": 1}
    headers |= {PROMPT_HEADER.decode(): "blocks"}
    asked = await probe(client, f"{url}/v1/completions", method="POST", headers=headers, body=body)
    try:
        blocks = msgspec.json.decode(asked.content, type=PromptBlocks)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if asked.status in _NOT_NOW:
            raise ConfigError(f"it is still loading (its /v1/completions says {asked.status})") from None
        return Introduction(models)
    if blocks.block_size < 1:
        raise ConfigError(f"it says that its blocks have {blocks.block_size} tokens")
    return Introduction(models, blocks.block_size, blocks.version)
