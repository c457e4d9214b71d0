"""Messages survive transport however the bytes are split, and unknown messages are refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config import EngineConfig
from quire.engine.messages import (
    Abort,
    Add,
    FrameBuffer,
    Outputs,
    Refused,
    Stop,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from quire.outputs import EngineStats, SequenceDelta, StepDeltas
from quire.request import InputSpan, Request, Task
from quire.sampling_params import SamplingParams
from quire.step import TokenLogprobs

PARAMS = SamplingParams(n=2, stop=["a", "b"], logit_bias={5: -1.5}, allowed_token_ids=[1, 2], seed=-1, max_tokens=None)
REQUEST = Request(
    request_id="é", prompt_token_ids=[0, 2**31 - 1], params=PARAMS, output_token_ids={1: [3]}, seed=2**64 - 1
)
WITH_INPUTS = Request(
    request_id="i",
    prompt_token_ids=[1, 7, 7, 7, 2],
    params=PARAMS,
    adapter="é",
    inputs=(InputSpan(bytes(range(256)), 1, 2), InputSpan(b"\x00", 3, 1)),
)
VECTOR = Request(request_id="v", prompt_token_ids=[1], params=SamplingParams(), task=Task.EMBED, max_tokens=0)
MESSAGES: list[ToEngine] = [Add(REQUEST), Add(WITH_INPUTS), Add(VECTOR), Abort(["a", "b"]), Stop([("a", 1)])]


@given(st.lists(st.integers(1, 40), max_size=60))
def test_any_cut_of_the_stream_gives_the_same_messages(sizes: list[int]) -> None:
    stream = b"".join(encode(message) for message in MESSAGES)
    buffer, bodies, place = FrameBuffer(), [], 0
    for size in [*sizes, len(stream)]:
        bodies += list(buffer.feed(stream[place : place + size]))
        place += size
    assert [decode_to_engine(body) for body in bodies] == MESSAGES


def test_outputs() -> None:
    entry = TokenLogprobs([1, 2], [-0.5, -1.0], [1, 2])
    delta = SequenceDelta("a", 0, [1], logprobs=[entry], finish_reason="stop", stop_reason=1, prompt_logprobs=[entry])
    message = Outputs(
        StepDeltas([("b", 1)], [7], others=[delta, SequenceDelta("v", 0, [], vector=bytes(range(256)))]),
        EngineStats(num_blocks=3),
    )
    (body,) = FrameBuffer().feed(encode(message))
    assert decode_from_engine(body) == message


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "Exec", "code": "1"}), b"cos\nsystem\n"]
)
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_to_engine(body)


def test_a_request_out_of_range_is_refused_by_the_decoder_too() -> None:
    frame = encode(Add(REQUEST)).replace(b"\xa1n\x02", b"\xa1n\x00")
    (body,) = FrameBuffer().feed(frame)
    with pytest.raises(msgspec.ValidationError, match="n is 0"):
        decode_to_engine(body)


def test_refused_and_config_round_trip() -> None:
    for message in (Refused("a", "m", None, "c"),):
        (body,) = FrameBuffer().feed(encode(message))
        assert decode_from_engine(body) == message
    config = EngineConfig(model="x", kv_cache_memory="1GiB", speculative_config={"method": "ngram"})  # type: ignore[arg-type]  # as flags give it
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config
