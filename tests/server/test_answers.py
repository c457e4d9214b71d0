"""One scripted generation through a third renderer: named events, its own end and its own form of errors."""

import asyncio
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from msgspec import Struct

from quire.errors import RequestError
from quire.outputs import CompletionOutput
from quire.sampling_params import SamplingParams
from quire.server import app
from quire.server.answers import Answer, Choice, Renderer, sse
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.generation import Generation, UsageCounter
from quire.server.scheduling_info import SchedulingInfo
from tests.server.running_server import RunningServer
from tests.server.scripted_engine import ANSWER, ScriptedEngine, bundled_tokenizer


class Message(Struct):
    """The toy protocol's reply."""

    texts: list[str]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class MessageRenderer(Renderer):
    """A protocol as unlike OpenAI's as those of other vendors: the last event holds the whole reply."""

    keeps_samples: ClassVar[bool] = True
    done: ClassVar[bytes] = b""

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        events = [sse({"input_tokens": usage.usage().prompt_tokens}, "message_start")] if choice.is_first else []
        return [*events, sse({"index": choice.index}, "block_start")]

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        return sse({"index": choice.index, "text": delta.text, "at": choice.num_events}, "block_delta")

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        return [sse(self.whole(list(choices), usage), "message_stop")]

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> Message:
        return Message([choice.sample.text for choice in choices], usage.usage().completion_tokens)

    def failure(self, error: RequestError) -> bytes:
        return sse({"why": error.code}, "error")


def generation(n: int = 2, num_prompts: int = 1) -> Generation:
    prompts = [[5 + index, 6, 7] for index in range(num_prompts)]
    return Generation(prompts, SamplingParams(n=n, max_tokens=100), SchedulingInfo())


async def ready_engine(**options: Any) -> ScriptedEngine:
    engine = ScriptedEngine(**options)
    await engine.start()
    await engine.wait_ready()
    return engine


def parse(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(event's name, its data) of each event."""
    events = []
    for event in stream.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_the_whole_reply_is_the_sum_of_the_events() -> None:
    async def scenario() -> tuple[bytes, object]:
        engine = await ready_engine()
        stream = b"".join([event async for event in Answer(generation(), MessageRenderer()).events(engine)])
        return stream, await Answer(generation(), MessageRenderer()).whole(engine)

    stream, whole = asyncio.run(scenario())
    num_tokens = len(bundled_tokenizer().encode(ANSWER, add_special_tokens=False))
    assert whole == Message([ANSWER, ANSWER], 2 * num_tokens)
    events = parse(stream)
    assert [name for name, _ in events[:3]] == ["message_start", "block_start", "block_delta"]
    assert events[0][1] == {"input_tokens": 3}
    assert events[-1] == ("message_stop", {"texts": [ANSWER, ANSWER], "output_tokens": 2 * num_tokens})
    for index in range(2):
        deltas = [data for name, data in events if name == "block_delta" and data["index"] == index]
        assert "".join(delta["text"] for delta in deltas) == ANSWER
        assert [delta["at"] for delta in deltas] == list(range(len(deltas)))
    assert [data["index"] for name, data in events if name == "block_start"] == [0, 1]


def test_choices_are_numbered_by_prompt_and_sample() -> None:
    async def scenario() -> list[tuple[int, int, list[int]]]:
        seen: list[Choice] = []

        class Recorder(MessageRenderer):
            def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> Message:
                seen.extend(choices)
                return MessageRenderer.whole(self, choices, usage)

        await Answer(generation(n=2, num_prompts=2), Recorder()).whole(await ready_engine())
        return [(choice.index, choice.prompt_index, choice.prompt.prompt_token_ids) for choice in seen]

    assert asyncio.run(scenario()) == [(0, 0, [5, 6, 7]), (1, 0, [5, 6, 7]), (2, 1, [6, 6, 7]), (3, 1, [6, 6, 7])]


def test_dropped_output_is_not_counted() -> None:
    async def scenario() -> object:
        answer = Answer(generation(), MessageRenderer(), usage=UsageCounter(counts_output=False))
        return await answer.whole(await ready_engine())

    assert asyncio.run(scenario()) == Message([ANSWER, ANSWER], 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_third_endpoint_is_a_renderer_and_a_row(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    async def create_message(context: RequestContext) -> None:
        await Answer(generation(n=1), MessageRenderer()).send(context, stream=stream)

    endpoint = Endpoint("POST", "/v1/toy", create_message, "A toy", reply=Message, streams=True)
    monkeypatch.setattr(app, "ENDPOINTS", (*app.ENDPOINTS, endpoint))
    engine = ScriptedEngine()
    with RunningServer(engine) as server:
        _, reply = server.send("POST", "/v1/toy", {})
        if not stream:
            assert reply["texts"] == [ANSWER]
            return
        name, data = parse(reply.encode())[-1]
        assert (name, data["texts"]) == ("message_stop", [ANSWER])
        engine.raises, engine.raises_at = OSError("/secret"), 2
        _, reply = server.send("POST", "/v1/toy", {})
        assert parse(reply.encode())[-1] == ("error", {"why": "internal_error"})
