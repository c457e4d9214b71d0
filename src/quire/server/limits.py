"""Limits on a request: bytes of headers and body, seconds without progress, samples, characters and tokens.

Every limit is checked before the data is buffered, tokenised or queued.
"""

import asyncio
import codecs
import zlib
from collections.abc import Sequence

from starlette.types import Receive, Scope

from quire.engine.limits import check_prompt_length
from quire.errors import RequestError
from quire.sampling_params import SamplingParams
from quire.server.errors import Refusal
from quire.server.settings import ServerSettings

MAX_VALUES = 250_000
"""Most commas between the values of a body."""
MAX_ESCAPES = 500_000
"""Most backslashes in a body."""
MAX_LISTS = 50_000
MAX_OBJECTS = 20_000
MAX_STRINGS = 30_000
"""Most texts in a body, names of fields included."""
_JSON_TYPES = (b"application/json", b"text/json", b"text/plain", b"application/x-www-form-urlencoded")
_PIECE_BYTES = 2**16
MIN_BODY_RATE = 8192
"""Bytes per second at which a body must arrive, after `stall_timeout` seconds."""


class ClientGoneError(Exception):
    """The client closed the connection, so there is nothing to send."""


def check_headers(scope: Scope, settings: ServerSettings) -> None:
    """Raise `Refusal` (431) for headers over the limit."""
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > settings.max_header_size:
        raise headers_too_large(settings.max_header_size)


async def read_body(scope: Scope, receive: Receive, settings: ServerSettings) -> bytes:
    """The whole body. Raises `Refusal` (413, 415, 408) before more than the limit is buffered."""
    headers = dict(scope["headers"])
    _check_content_type(headers.get(b"content-type", b""))
    inflate = _inflater(headers.get(b"content-encoding", b""))
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > settings.max_body_size:
        raise _body_too_large(settings)
    parts: list[bytes] = []
    size = 0
    started = asyncio.get_running_loop().time()
    while True:
        try:
            async with asyncio.timeout_at(_latest(started, size, settings)):
                message = await receive()
        except TimeoutError:
            raise Refusal(408, "the body did not arrive in time", code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        parts.append(part if inflate is None else _inflate(inflate, part, settings.max_body_size - size + 1))
        size += len(parts[-1])
        if size > settings.max_body_size:
            raise _body_too_large(settings)
        if not message.get("more_body", False):
            break
    if inflate is not None and not inflate.eof:
        raise Refusal(400, "the compressed body ends early", code="invalid_encoding")
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    return body.removeprefix(codecs.BOM_UTF8)


def _check_content_type(value: bytes) -> None:
    """Browsers send JSON as text/plain, `curl -d` as a form, and some clients leave the type out."""
    kind = value.split(b";")[0].strip().lower()
    if kind and kind not in _JSON_TYPES and not kind.endswith(b"+json"):
        raise Refusal(
            415,
            f"content-type is {kind.decode('latin-1')[:100]}; send JSON as application/json",
            code="unsupported_media_type",
        )


def _inflater(value: bytes) -> "zlib._Decompress | None":
    encoding = value.strip().lower()
    if encoding in (b"", b"identity"):
        return None
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        raise Refusal(
            415,
            f"content-encoding is {encoding.decode('latin-1')[:100]}; gzip and deflate are supported",
            code="unsupported_encoding",
        )
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: read the header of gzip or zlib


def _inflate(inflate: "zlib._Decompress", part: bytes, most: int) -> bytes:
    """At most `most` bytes of the decompressed `part`: the caller refuses so many."""
    try:
        return inflate.decompress(part, most)
    except zlib.error as error:
        raise Refusal(400, f"the compressed body is damaged: {error}", code="invalid_encoding") from None


def _latest(started: float, size: int, settings: ServerSettings) -> float | None:
    """When the next bytes of a body must arrive if it has `size` bytes since `started`; None: no limit."""
    if not settings.stall_timeout:
        return None
    now = asyncio.get_running_loop().time()
    return settings.stall_timeout + min(now, started + size / MIN_BODY_RATE)


def check_shape(body: bytes) -> None:
    """Raise `Refusal` (400) for JSON of so many values that decoding it would delay other requests.

    Commas and brackets inside texts are no values: a prompt may hold as many as the context takes.
    """
    _check_number("escapes", body, b"\\", MAX_ESCAPES)
    if b"\\" in body:
        body = body.replace(rb"\\", b"").replace(rb"\"", b"")  # every quote that is left begins or ends a text
    _check_number("texts", body, b'"', MAX_STRINGS, marks_each=2)
    limits = (("commas", b",", MAX_VALUES), ("lists", b"[", MAX_LISTS), ("objects", b"{", MAX_OBJECTS))
    if any(_exceeds(body, mark, most) for _, mark, most in limits):
        body = b"".join(body.split(b'"')[::2])
        for what, mark, most in limits:
            _check_number(what, body, mark, most)


def _exceeds(body: bytes, mark: bytes, most: int) -> bool:
    """Whether `body` has more than `most` of the mark. Counting millions would take as long as decoding them."""
    if len(body) <= most:
        return False
    number = 0
    for begin in range(0, len(body), _PIECE_BYTES):
        number += body.count(mark, begin, begin + _PIECE_BYTES)
        if number > most:
            return True
    return False


def _check_number(what: str, body: bytes, mark: bytes, most: int, marks_each: int = 1) -> None:
    if _exceeds(body, mark, (most + 1) * marks_each - 1):
        raise Refusal(
            400, f"the body holds more than {most:,} {what}, the most that are read. Split it", code="body_too_complex"
        )


def check_work(prompts: Sequence[object], n: int, settings: ServerSettings, *, param: str = "prompt") -> None:
    """Refuse a request with too many samples or characters, before any of it is tokenised. `param` is the field that
    the client sent the prompts in."""
    if len(prompts) * n > settings.max_samples:
        raise RequestError(
            f"{len(prompts)} prompts × n {n} are {len(prompts) * n} samples; at most {settings.max_samples} are "
            "allowed in one request (--max-samples)",
            code="too_many_samples",
            param=param if len(prompts) > 1 else "n",
        )
    chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    if chars > settings.max_prompt_chars:
        raise RequestError(
            f"the prompt has {chars} characters; at most {settings.max_prompt_chars} are allowed (--max-prompt-chars)",
            code="prompt_too_long",
            param=param,
        )


def check_lengths(
    prompts: Sequence[Sequence[int]], params: SamplingParams, max_model_len: int, *, param: str = "prompt"
) -> None:
    """Refuse prompts that do not fit the context with `max_tokens`, all before the first is queued. The engine checks
    each again. `param` is the field that the client sent them in."""
    for index, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {index}"
        if prompt and params.truncate_prompt_tokens is not None:
            continue
        check_prompt_length(len(prompt), max_model_len, name=name, param=param)
        if params.max_tokens is not None and len(prompt) + params.max_tokens > max_model_len:
            raise RequestError(
                f"{name} has {len(prompt)} tokens and max_tokens is {params.max_tokens}, but this model's "
                f"maximum context length is {max_model_len} tokens: the prompt is too long, or max_tokens too large",
                param="max_tokens",
                code="context_length_exceeded",
            )


def headers_too_large(limit: int) -> Refusal:
    return Refusal(431, f"request line and headers have more than {limit} bytes", code="headers_too_large")


def _body_too_large(settings: ServerSettings) -> Refusal:
    return Refusal(
        413,
        f"the body has more than {settings.max_body_size} bytes (--max-body-size); split the request",
        code="body_too_large",
    )
