"""Messages between the API process and its child processes: typed values, as length-prefixed MessagePack.

Messages cannot carry code. Nothing listens: a child inherits one end of a socketpair (see `engine_process`).
"""

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from quire.config import EngineConfig
from quire.engine.memory_plan import MemoryPlan
from quire.image_input import ReadImage
from quire.model_config import VisionConfig
from quire.outputs import EngineStats, MemoryReport, StepDeltas
from quire.pool_view import BlockDetail, PoolChange, RequestDetail
from quire.request import Request
from quire.structured_outputs import StructuredOutputsParams

_LENGTH = struct.Struct(">I")


class Prepare(msgspec.Struct, tag=True):
    """First message to a spare engine process: import what any model needs, and wait for `Load`."""


class Load(msgspec.Struct, tag=True):
    """The model to load; the first message after at most a `Prepare`."""

    config: EngineConfig
    plan: MemoryPlan
    folder: str
    index: int = 0
    """The engine's place among equal ones; it takes the cards that follow those of the engines before it."""


class RankLoad(msgspec.Struct):
    """The part of a model that a rank other than 0 loads."""

    config: EngineConfig
    plan: MemoryPlan
    folder: str
    rank: int
    meeting_file: str
    """Where the ranks find each other."""


class Add(msgspec.Struct, tag=True):
    request: Request


class Abort(msgspec.Struct, tag=True):
    request_ids: list[str]


class Stop(msgspec.Struct, tag=True):
    """Ends samples, given as (request id, index), whose text contains a stop string."""

    samples: list[tuple[str, int]]


class ResetPrefixCache(msgspec.Struct, tag=True):
    pass


class RegisterPrefix(msgspec.Struct, tag=True):
    """Compute a prefix and pin it, findable under all `salts`. Answered by `PrefixAccepted` or `Refused`."""

    prefix_id: str
    token_ids: list[int]
    salts: tuple[str, ...]


class PrefixAccepted(msgspec.Struct, tag=True):
    """The prefix passed the checks and will be computed."""

    prefix_id: str


class ReportMemory(msgspec.Struct, tag=True):
    """Asks for one `MemoryReported`."""


class WatchPool(msgspec.Struct, tag=True):
    """Somebody looks at the KV pool from now on (answered by `PoolChanged`, again and again), or nobody does."""

    on: bool


class DescribeMemory(msgspec.Struct, tag=True):
    """Asks for one `MemoryDescribed`, of a block or of a request."""

    block: int | None = None
    request_id: str = ""


class PoolChanged(msgspec.Struct, tag=True):
    """What changed in the pool since the last `PoolChanged`."""

    change: PoolChange


class MemoryDescribed(msgspec.Struct, tag=True):
    """Answer to `DescribeMemory`, in the order of the questions; without either if there is no such thing."""

    block: BlockDetail | None = None
    request: RequestDetail | None = None


class PhaseDone(msgspec.Struct, tag=True):
    """A phase of start-up has ended, after this many seconds."""

    name: str
    seconds: float


class Ready(msgspec.Struct, tag=True):
    pass


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start; `kind` is the name of the error's class."""

    kind: str
    message: str


class Refused(msgspec.Struct, tag=True):
    """A request or prefix that failed the engine's checks."""

    request_id: str
    message: str
    param: str | None
    code: str


class Outputs(msgspec.Struct, tag=True):
    """Results of one step."""

    deltas: StepDeltas
    stats: EngineStats


class MemoryReported(msgspec.Struct, tag=True):
    """Answer to `ReportMemory`; answers come in the order of the questions."""

    report: MemoryReport


class LoadVocabulary(msgspec.Struct, tag=True):
    """First message to a grammar process: the tokens to compile for."""

    folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class CheckGrammar(msgspec.Struct, tag=True):
    spec: StructuredOutputsParams


class GrammarChecked(msgspec.Struct, tag=True):
    """Answer to both messages; `error` is the message for the client."""

    num_bytes: int = 0
    """Size of the compiled grammar."""
    error: str | None = None
    code: str = "invalid_value"


class LoadTemplate(msgspec.Struct, tag=True):
    """First message to a template process: the folder of the model."""

    folder: str


class RenderMessages(msgspec.Struct, tag=True):
    """Render messages of OpenAI's format; `options` are those of `ChatTemplate.render`."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]


class Rendered(msgspec.Struct, tag=True):
    """Answer to both messages; `error` is the message for the client, or for the operator if the template is broken."""

    text: str = ""
    error: str | None = None
    param: str | None = None
    code: str = "invalid_value"


class PrepareImages(msgspec.Struct, tag=True):
    """First message to an image process: what images are read for, and the most pixels of one. Answered by an
    `ImageAnswer` without an image."""

    vision: VisionConfig
    max_pixels: int


class DecodeImage(msgspec.Struct, tag=True):
    """The bytes of a file. Answered by an `ImageAnswer`."""

    data: bytes


class ImageAnswer(msgspec.Struct, tag=True):
    """An image, or the message for the client."""

    image: ReadImage | None = None
    error: str | None = None
    code: str = "invalid_image"


ToEngine = (
    Prepare | Load | Add | Abort | Stop | ResetPrefixCache | RegisterPrefix | ReportMemory | WatchPool | DescribeMemory
)
FromEngine = (
    PhaseDone | Ready | Failed | Refused | PrefixAccepted | Outputs | MemoryReported | PoolChanged | MemoryDescribed
)
ToChecker = LoadVocabulary | CheckGrammar
ToRenderer = LoadTemplate | RenderMessages
ToImageProcess = PrepareImages | DecodeImage
Question = ToChecker | ToRenderer | ToImageProcess
"""What an expendable process is asked."""

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_to_checker: msgspec.msgpack.Decoder[ToChecker] = msgspec.msgpack.Decoder(ToChecker)
_from_checker = msgspec.msgpack.Decoder(GrammarChecked)
_to_renderer: msgspec.msgpack.Decoder[ToRenderer] = msgspec.msgpack.Decoder(ToRenderer)
_from_renderer = msgspec.msgpack.Decoder(Rendered)
_to_image_process: msgspec.msgpack.Decoder[ToImageProcess] = msgspec.msgpack.Decoder(ToImageProcess)
_from_image_process = msgspec.msgpack.Decoder(ImageAnswer)


def encode(message: ToEngine | FromEngine | Question | GrammarChecked | Rendered | ImageAnswer) -> bytes:
    """One frame: a length of four bytes, then the message."""
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


def decode_to_renderer(body: bytes) -> ToRenderer:
    return _to_renderer.decode(body)


def decode_from_renderer(body: bytes) -> Rendered:
    return _from_renderer.decode(body)


def decode_to_image_process(body: bytes) -> ToImageProcess:
    return _to_image_process.decode(body)


def decode_from_image_process(body: bytes) -> ImageAnswer:
    return _from_image_process.decode(body)


class FrameBuffer:
    """Assembles received bytes into the bodies of complete frames."""

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
