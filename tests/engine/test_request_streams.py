"""Taps: outputs that are taken in the pass that delivers them, in order with those that the consumer gets."""

import asyncio
from collections.abc import Callable

import pytest

from quire.engine.messages import Abort, ToEngine
from quire.engine.request_streams import RequestStreams, Stream, Tap
from quire.outputs import SequenceDelta, StepDeltas
from quire.request import Request
from quire.sampling_params import SamplingParams
from tests.server.scripted_engine import bundled_tokenizer


class Consumer:
    """Reads a stream to its end, and does `work` with each output."""

    def __init__(self, num_refused: int = 0) -> None:
        self.sent: list[ToEngine] = []
        self.streams = RequestStreams(bundled_tokenizer(), self.sent.append)
        self.seen: list[tuple[str, list[int]]] = []
        self.num_refused = num_refused
        self.stream = self.streams.open(
            Request(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(n=2), max_tokens=50), None
        )
        self.stream.tap = Tap(self.is_ready, self.add)

    def is_ready(self) -> bool:
        self.num_refused -= 1
        return self.num_refused < 0

    def add(self, index: int, text: str, token_id: int, now: float) -> None:
        self.seen.append(("tap", [token_id]))

    async def read(self) -> None:
        finished = False
        while not finished:
            output = await self.stream.next()
            finished = output.finished
            self.seen += [("next", list(sample.token_ids)) for sample in output.outputs]
            await asyncio.sleep(0)  # as for a write: meanwhile the consumer does not wait

    def deliver(self, *token_ids: int, last: bool = False) -> None:
        for token_id in token_ids:
            if last:
                ends = [SequenceDelta("r", index, [token_id], finish_reason="stop") for index in range(2)]
                self.streams.deliver(StepDeltas(others=ends))
            else:
                self.streams.deliver(StepDeltas(samples=[("r", 0)], token_ids=[token_id]))


def run(consumer: Consumer, *turns: Callable[[], None]) -> list[tuple[str, list[int]]]:
    """Let the consumer wait, then take the turns, each in one pass of the event loop."""

    async def scenario() -> None:
        reading = asyncio.create_task(consumer.read())
        await asyncio.sleep(0)
        for turn in turns:
            turn()
            await asyncio.sleep(0)
        await reading

    asyncio.run(scenario())
    return consumer.seen


def test_a_tap_takes_all_but_the_last_output() -> None:
    consumer = Consumer()
    seen = run(consumer, lambda: consumer.deliver(4, 5), lambda: consumer.deliver(6), lambda: end(consumer))
    assert seen == [("tap", [4]), ("tap", [5]), ("tap", [6]), ("next", [9]), ("next", [9])]


def test_what_a_tap_refuses_stays_in_front_of_what_follows() -> None:
    """The consumer is woken and holds the output; until it waits again, the tap is offered nothing."""
    consumer = Consumer(num_refused=1)
    turns = [lambda: consumer.deliver(4, 5), lambda: consumer.deliver(6), lambda: consumer.deliver(7)]
    seen = run(consumer, *turns, lambda: None, lambda: None, lambda: consumer.deliver(8), lambda: end(consumer))
    assert [token_id for _, token_ids in seen for token_id in token_ids] == [4, 5, 6, 7, 8, 9, 9]
    assert seen[0] == ("next", [4, 5])
    assert ("tap", [8]) in seen


def test_an_error_of_a_tap_ends_its_request_alone() -> None:
    consumer = Consumer()

    def broken(index: int, text: str, token_id: int, now: float) -> None:
        raise ZeroDivisionError

    consumer.stream.tap = Tap(consumer.is_ready, broken)
    with pytest.raises(ZeroDivisionError):
        run(consumer, lambda: consumer.deliver(4), lambda: consumer.deliver(5))
    assert Abort(["r"]) in consumer.sent
    other = consumer.streams.open(Request(request_id="s", prompt_token_ids=[1], params=SamplingParams()), None)
    consumer.streams.deliver(StepDeltas(samples=[("s", 0)], token_ids=[4]))
    output = other.take()
    assert output is not None
    assert output.outputs[0].token_ids == [4]


def end(consumer: Consumer) -> None:
    consumer.deliver(9, last=True)


def test_a_stream_without_a_tap_merges_what_is_not_read() -> None:
    consumer = Consumer()
    stream: Stream = consumer.stream
    stream.tap = None
    consumer.deliver(4, 5, 6)
    output = stream.take()
    assert output is not None
    assert output.outputs[0].token_ids == [4, 5, 6]
    assert stream.take() is None
