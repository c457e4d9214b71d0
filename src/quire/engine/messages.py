"""What the API process and the engine process say to each other: typed values, as MessagePack, length-prefixed.

Nothing here can carry code, and nothing listens: the two ends of a socketpair are inherited (see `engine_process`).
"""

import struct
from collections.abc import Iterator

import msgspec

from quire.config import EngineConfig
from quire.engine.memory_plan import MemoryPlan
from quire.outputs import EngineStats, MemoryReport, StepDeltas
from quire.request import Request
from quire.structured_outputs import StructuredOutputsParams

_LENGTH = struct.Struct(">I")


class Load(msgspec.Struct, tag=True):
    """First message to an engine: what to load, from which folder."""

    config: EngineConfig
    plan: MemoryPlan
    folder: str


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    request_ids: list[str]


class Stop(msgspec.Struct, tag=True):
    """Samples (request id, index) whose text has reached a stop string."""

    samples: list[tuple[str, int]]


class ResetPrefixCache(msgspec.Struct, tag=True):
    pass


class RegisterPrefix(msgspec.Struct, tag=True):
    """Compute a prefix and keep it, findable under all `salts`."""

    prefix_id: str
    token_ids: list[int]
    salts: tuple[str, ...]


class ReportMemory(msgspec.Struct, tag=True):
    """Asks for one `MemoryReported`."""


class PhaseDone(msgspec.Struct, tag=True):
    """A phase of start-up has ended."""

    name: str
    seconds: float


class Ready(msgspec.Struct, tag=True):
    pass


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start; `kind` is the name of the error's class."""

    kind: str
    message: str


class Refused(msgspec.Struct, tag=True):
    """A request that the engine's door turned away."""

    request_id: str
    message: str
    param: str | None
    code: str


class Outputs(msgspec.Struct, tag=True):
    """What one step brought."""

    deltas: StepDeltas
    stats: EngineStats


class MemoryReported(msgspec.Struct, tag=True):
    """The answer to `ReportMemory`; answers come in the order of the questions."""

    report: MemoryReport


class LoadVocabulary(msgspec.Struct, tag=True):
    """First message to a grammar process: whose tokens to compile for."""

    folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class CheckGrammar(msgspec.Struct, tag=True):
    form: StructuredOutputsParams


class GrammarChecked(msgspec.Struct, tag=True):
    """The answer to either; the error is for the client."""

    num_bytes: int = 0
    """Of the compiled grammar."""
    error: str | None = None
    code: str = "invalid_value"


ToEngine = Load | Add | Abort | Stop | ResetPrefixCache | RegisterPrefix | ReportMemory
FromEngine = PhaseDone | Ready | Failed | Refused | Outputs | MemoryReported
ToChecker = LoadVocabulary | CheckGrammar

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_to_checker: msgspec.msgpack.Decoder[ToChecker] = msgspec.msgpack.Decoder(ToChecker)
_from_checker = msgspec.msgpack.Decoder(GrammarChecked)


def encode(message: ToEngine | FromEngine | ToChecker | GrammarChecked) -> bytes:
    """One frame: four bytes of length, then the message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def decode_to_engine(body: bytes) -> ToEngine:
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    return _from_engine.decode(body)


def decode_to_checker(body: bytes) -> ToChecker:
    return _to_checker.decode(body)


def decode_from_checker(body: bytes) -> GrammarChecked:
    return _from_checker.decode(body)


class FrameBuffer:
    """Bytes as they arrive → the bodies of complete frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield body
