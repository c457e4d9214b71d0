"""Handover: how a stream that one server began goes on at another, agreed between these servers and `quire router`.

The router sends the header x-quire-stream: an id and a time for the answer, so that two servers write the same ones,
and how many bytes of progress stand before the body. The server puts a mark after the events of each step: a comment of
the event stream with the tokens that the events stand for. The router forwards events up to a mark and keeps its
tokens. If the server dies, another one gets the same request and the progress, renders nothing of it, and goes on.

The header x-quire-prompt asks for the block hashes of the prompt instead of an answer; with the value `compute` the
server first computes the prompt, so that another one can fetch its blocks. That one gets the header x-quire-prefilled.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from quire.kv_cache.block_hash import hash_block, root_hash
from quire.outputs import CompletionOutput
from quire.request import SampleProgress
from quire.server.errors import Refusal

STREAM_HEADER = b"x-quire-stream"
"""In a request: `ID CREATED BYTES`. In a response: the server writes marks."""
PROMPT_HEADER = b"x-quire-prompt"
COMPUTE = b"compute"
PREFILLED_HEADER = b"x-quire-prefilled"
MARK = b": quire "
"""Begins a mark. No event holds a line that begins so: JSON writes a line end as an escape."""
MOVED = MARK + b"moved\n\n"
"""Ends the stream of a server that cannot finish it: another one can."""
HASH_BYTES = 8
"""A block hash travels as its last bytes, as in KV events."""

_Progress = list[tuple[int, list[int], str | None]]
"""(choice, tokens, finish reason)"""

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[_Progress] = msgspec.json.Decoder(_Progress)


class PromptBlocks(msgspec.Struct):
    """What a router needs of a prompt to choose a server for it."""

    model: str
    block_size: int
    num_tokens: int
    """Tokens of all prompts of the request."""
    hashes: bytes
    """Hashes of the full blocks of the first prompt, `HASH_BYTES` each."""
    content: bytes = b""
    """A digest of prompts and parameters, without the seed and the client."""
    version: str = ""
    """Version of the server: another one may continue a stream with other tokens."""


@dataclass(frozen=True, slots=True)
class Handover:
    """The header x-quire-stream of one request."""

    stream_id: str
    """32 hexadecimal digits."""
    created: int
    """Unix time at which the answer began."""
    num_bytes: int = 0
    """Bytes of progress that precede the body."""
    progress: Mapping[int, SampleProgress] = field(default_factory=dict)
    """Choices whose tokens the client has, by index."""

    @classmethod
    def from_header(cls, value: bytes) -> "Handover":
        """Raises `Refusal` for a value of another form."""
        try:
            stream_id, created, num_bytes = value.decode("ascii").split()
            return cls(uuid.UUID(hex=stream_id).hex, int(created), _count(num_bytes))
        except ValueError:
            raise Refusal(
                400,
                f"the header x-quire-stream is {value[:80].decode('latin-1')!r}; it is the router's: 32 hexadecimal "
                "digits, a Unix time, and the bytes of progress before the body",
                code="invalid_value",
                param="x-quire-stream",
            ) from None

    def header(self) -> bytes:
        return f"{self.stream_id} {self.created} {self.num_bytes}".encode()


def encode_progress(progress: Mapping[int, SampleProgress]) -> bytes:
    return _encoder.encode([(index, *sample) for index, sample in progress.items()])


def decode_progress(data: bytes) -> dict[int, SampleProgress]:
    """Raises `Refusal` for bytes that are no progress."""
    try:
        return {index: SampleProgress(token_ids, reason) for index, token_ids, reason in _decoder.decode(data)}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(
            400, f"the progress before the body cannot be read: {error}", code="invalid_value", param="x-quire-stream"
        ) from None


def mark(deltas: Sequence[tuple[int, CompletionOutput]]) -> bytes:
    """A mark for the (choice, delta) pairs whose events precede it."""
    return MARK + _encoder.encode([(index, delta.token_ids, delta.finish_reason) for index, delta in deltas]) + b"\n\n"


def read_mark(data: bytes) -> _Progress:
    """The content of a mark without `MARK`. Raises `msgspec.DecodeError`."""
    return _decoder.decode(data)


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str, adapter: str = "") -> bytes:
    """The hashes of the full blocks of a prompt, as the engine makes them, `HASH_BYTES` each."""
    parent, hashes = root_hash(salt, block_size, adapter), []
    for start in range(0, len(token_ids) // block_size * block_size, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size])
        hashes.append(parent[-HASH_BYTES:])
    return b"".join(hashes)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)
