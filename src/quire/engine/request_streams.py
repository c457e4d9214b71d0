"""RequestStreams: requests in flight in the process that answers clients, each a stream of output deltas.

Each keeps what a new engine process needs to continue it: the request and its tokens so far. A request that was in
flight at two deaths of the engine is taken for the cause and ended.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from quire.engine.messages import Abort, Add, Stop, ToEngine
from quire.engine.output_processor import OutputProcessor
from quire.engine.tokenizer import Tokenizer
from quire.errors import EngineDeadError, QuireError
from quire.outputs import RequestOutput, SequenceDelta, StepDeltas
from quire.request import Request

DEATHS_PER_REQUEST = 2
"""A request that was in flight at this many deaths of the engine is not tried again."""


@dataclass(slots=True)
class Stream:
    """One request in flight."""

    request: Request
    live: dict[int, list[int]]
    """Samples that have not ended → their tokens so far."""
    output: RequestOutput | None = None
    """Merged deltas that the consumer has not read yet; they take at most the memory of the whole output."""
    error: QuireError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `take` has something to return or to raise."""
    num_prompt_logprobs: int = 0
    """Prompt positions whose log-probabilities were delivered."""
    num_repeated_prompt_logprobs: int = 0
    """How many of them the present engine process will compute again."""
    num_deaths: int = 0

    def take(self) -> RequestOutput | None:
        """The deltas since the last call, None if there are none. Raises the error that ended the stream."""
        self.changed.clear()
        if self.error is not None:
            raise self.error
        output, self.output = self.output, None
        return output


class RequestStreams:
    """Owns the streams and the text side of their requests."""

    def __init__(self, tokenizer: Tokenizer | None, send: Callable[[ToEngine], None]) -> None:
        """`send` takes messages to the engine process."""
        self._outputs = OutputProcessor(tokenizer)
        self._send = send
        self._streams: dict[str, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_live(self) -> int:
        """Requests that the engine has not finished."""
        return sum(1 for stream in self._streams.values() if stream.live)

    def open(self, request: Request, prompt: str | None) -> Stream:
        """Send a request to the engine. `close` must follow."""
        request_id = request.request_id
        stream = self._streams[request_id] = Stream(request, {index: [] for index in range(request.params.n)})
        self._outputs.add(request, prompt)
        self._send(Add(request))
        return stream

    def close(self, stream: Stream) -> None:
        """The consumer has gone: abort the request if it still runs."""
        request_id = stream.request.request_id
        if self._streams.pop(request_id, None) is not None and stream.live:
            self._outputs.discard(request_id)
            self._send(Abort([request_id]))

    def deliver(self, deltas: StepDeltas) -> int:
        """Add the results of a step to the streams; returns how many requests it finished."""
        for (request_id, index), token_id in zip(deltas.samples, deltas.token_ids, strict=True):
            stream = self._streams.get(request_id)
            if stream is not None and index in stream.live:
                stream.live[index].append(token_id)
        for delta in deltas.others:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                _record(stream, delta)
        outputs, stopped = self._outputs.process(deltas)
        for request_id, index in stopped:
            self._streams[request_id].live.pop(index, None)
        if stopped:
            self._send(Stop(stopped))
        for output in outputs:
            stream = self._streams[output.request_id]
            if stream.output is None:
                stream.output = output
            else:
                stream.output.extend(output)
            stream.changed.set()
        return sum(output.finished for output in outputs)

    def end(self, request_id: str, error: QuireError) -> None:
        """End a stream with an error. Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.live.clear()
            stream.error = error
            stream.changed.set()
            self._outputs.discard(request_id)

    def end_all(self, error: QuireError) -> None:
        """End all streams with an error."""
        for request_id in list(self._streams):
            self.end(request_id, error)

    def count_death(self) -> None:
        """The engine process died: end the streams that have seen too many deaths."""
        self._outputs.restart()
        for request_id, stream in list(self._streams.items()):
            stream.num_deaths += 1
            if stream.num_deaths >= DEATHS_PER_REQUEST:
                self.end(
                    request_id, EngineDeadError(f"the engine process died {stream.num_deaths} times on this request")
                )

    def resume(self) -> None:
        """Send all live requests, with their tokens so far, to a new engine process."""
        for stream in self._streams.values():
            if stream.live:
                stream.num_repeated_prompt_logprobs = stream.num_prompt_logprobs
                self._send(Add(replace(stream.request, output_token_ids=stream.live)))


def _record(stream: Stream, delta: SequenceDelta) -> None:
    """Keep the delta's tokens; drop prompt log-probabilities that an earlier engine process delivered."""
    if delta.prompt_logprobs is not None:
        repeated = min(stream.num_repeated_prompt_logprobs, len(delta.prompt_logprobs))
        stream.num_repeated_prompt_logprobs -= repeated
        delta.prompt_logprobs = delta.prompt_logprobs[repeated:] or None
        stream.num_prompt_logprobs += len(delta.prompt_logprobs or ())
    if delta.finish_reason is not None:
        stream.live.pop(delta.index, None)
    elif delta.index in stream.live:
        stream.live[delta.index] += delta.token_ids
