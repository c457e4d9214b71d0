"""RequestStreams: requests in flight in the process that answers clients, each a stream of output deltas.

Each keeps what a new engine process needs to continue it: the request and its tokens so far. `Blame` decides which
requests run after a death, and which one is at fault and ended.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from quire.engine.blame import Blame, Quarantine
from quire.engine.engine_child import Death
from quire.engine.limits import NOTHING_YET
from quire.engine.messages import Abort, Add, Stop, ToEngine
from quire.engine.output_processor import OutputProcessor, TextLine
from quire.engine.tokenizer import Tokenizer
from quire.errors import DeadlineError, QuarantinedError, QueueFullError, QuireError
from quire.outputs import RequestOutput, SequenceDelta, StepDeltas
from quire.request import Request, SampleProgress

logger = logging.getLogger(__name__)

APART_SECONDS = 5.0
"""Seconds that suspects of a death run apart. If the engine lives that long, other requests run beside them again."""
MAX_PIXEL_BYTES = 2**30
"""Pixels of all requests in flight."""
QUARANTINE_SECONDS = 600.0
"""Seconds for which the content of a request that killed the engine is refused."""


@dataclass(frozen=True, slots=True)
class Tap:
    """Takes tokens in the pass that delivers them, and spares a switch of tasks for each. It gets tokens that add
    nothing but text, while the consumer waits and holds no output, so that their order stays."""

    ready: Callable[[], bool]
    """Whether it can take a token now."""
    add: Callable[[int, str, int, float], None]
    """Takes (index of the sample, text, token, time)."""


@dataclass(slots=True)
class Stream:
    """One request in flight."""

    request: Request
    live: dict[int, list[int]]
    """Samples that have not ended → their tokens so far."""
    is_sent: bool = False
    """Whether the present engine process has the request."""
    output: RequestOutput | None = None
    """Merged deltas that the consumer has not read yet; they take at most the memory of the whole output."""
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `next` has something to return or to raise."""
    tap: Tap | None = None
    lines: dict[int, TextLine] = field(default_factory=dict)
    """One for each sample from which the tap takes tokens."""
    is_awaited: bool = False
    """The consumer waits in `next`."""
    replayed: RequestOutput | None = None
    """What another engine had made of the request."""
    deadline: asyncio.TimerHandle | None = None
    num_prompt_logprobs: int = 0
    """Prompt positions whose log-probabilities were delivered."""
    num_repeated_prompt_logprobs: int = 0
    """How many of them the present engine process will compute again."""

    async def next(self) -> RequestOutput:
        """What has arrived since the last call, apart from what the tap took. Raises the error that ended the request,
        once its output is read."""
        output = None
        while output is None:
            self.is_awaited = True
            await self.changed.wait()
            self.is_awaited = False
            output = self.take()
        return output

    def take(self) -> RequestOutput | None:
        """What has arrived, if anything has; raises as `next` does."""
        if self.error is None:
            self.changed.clear()
        elif self.output is None:
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
        self._blame = Blame()
        self._quarantine = Quarantine(QUARANTINE_SECONDS, time.monotonic)
        self._progress = False
        """Whether the engine computed something since the last death."""
        self._apart: asyncio.TimerHandle | None = None
        """Runs while suspects run apart."""

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_live(self) -> Counter[str]:
        """Requests that the engine has not finished, by tenant."""
        return Counter(stream.request.tenant for stream in self._streams.values() if stream.live)

    def _check_pixels(self, request: Request) -> None:
        wanted = request.num_pixel_bytes
        if not wanted:
            return
        held = sum(stream.request.num_pixel_bytes for stream in self._streams.values())
        if held + wanted > MAX_PIXEL_BYTES:
            raise QueueFullError(
                f"the images of requests in flight take {held:,} bytes of pixels and these {wanted:,}; the limit is "
                f"{MAX_PIXEL_BYTES:,}",
                retry_after=1,
            )

    @property
    def any_live(self) -> bool:
        """Whether the engine has not finished a request."""
        return any(stream.live for stream in self._streams.values())

    def open(
        self,
        request: Request,
        prompt: str | None,
        timeout: float | None = None,
        progress: Mapping[int, SampleProgress] = NOTHING_YET,
    ) -> Stream:
        """Send a request to the engine; after `timeout` seconds it is ended. `close` must follow.

        `progress` has the samples that another engine began; the request holds those that go on.

        Raises `QuarantinedError`, and `QueueFullError` for images that exceed `MAX_PIXEL_BYTES` with those in flight.
        """
        if seconds := self._quarantine.remaining(request):
            raise QuarantinedError(
                f"the engine died whenever it computed a request like this one; it is refused for {seconds:.0f} s more"
            )
        self._check_pixels(request)
        request_id = request.request_id
        live = {index: list(request.output_token_ids.get(index, ())) for index in range(request.params.n)}
        stream = self._streams[request_id] = Stream(request, live)
        self._outputs.add(request, prompt)
        if progress:
            self._replay(stream, progress)
            if not live:
                return stream
        if timeout is not None:
            stream.deadline = asyncio.get_running_loop().call_later(timeout, self._expire, request_id, timeout)
        if self._blame.may_run(request_id):
            stream.is_sent = True
            self._send(Add(request))
        return stream

    def _replay(self, stream: Stream, progress: Mapping[int, SampleProgress]) -> None:
        """Bring the text side of a request to where another engine left it."""
        request_id = stream.request.request_id
        others = [
            SequenceDelta(request_id, index, sample.token_ids, finish_reason=sample.finish_reason)
            for index, sample in progress.items()
        ]
        (stream.replayed,), stopped = self._outputs.process(StepDeltas(others=others))
        for index in [index for index, sample in progress.items() if sample.finish_reason is not None]:
            stream.live.pop(index, None)
        for _, index in stopped:
            stream.live.pop(index, None)

    def close(self, stream: Stream) -> None:
        """The consumer has gone: abort the request if it still runs."""
        request_id = stream.request.request_id
        if stream.deadline is not None:
            stream.deadline.cancel()
        if self._streams.pop(request_id, None) is not None and stream.live:
            self._outputs.discard(request_id)
            self._abort(stream)

    def deliver(self, deltas: StepDeltas) -> int:
        """Add the results of a step to the streams; returns how many requests it finished."""
        rest = self._deliver_tokens(deltas)
        for delta in deltas.others:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                _record(stream, delta)
        if len(deltas):
            self._progress = True
            if self._blame.has_suspects:
                self._clear(*{delta.request_id for delta in deltas})
        outputs, stopped = self._outputs.process(rest)
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

    def _deliver_tokens(self, deltas: StepDeltas) -> StepDeltas:
        """Keep the tokens of the samples that gained no more, and give them to the taps. Returns what is left. An error
        of a tap ends its request alone."""
        rest = StepDeltas(others=deltas.others)
        streams, now = self._streams, time.monotonic()
        for sample, token_id in zip(deltas.samples, deltas.token_ids, strict=True):
            request_id, index = sample
            stream = streams.get(request_id)
            if stream is None or (token_ids := stream.live.get(index)) is None:
                continue  # aborted or stopped while this token was under way
            token_ids.append(token_id)
            tap = stream.tap
            if tap is not None and stream.is_awaited and stream.output is None and tap.ready():
                line = stream.lines.get(index) or self._open_line(stream, index, now)
                if line is not None:
                    line.times.last_token_time = now
                    try:
                        tap.add(index, line.next(token_id), token_id, now)
                    except Exception as error:
                        self._abort(stream)
                        self.end(request_id, error)
                    continue
            rest.samples.append(sample)
            rest.token_ids.append(token_id)
        return rest

    def _open_line(self, stream: Stream, index: int, now: float) -> TextLine | None:
        line = self._outputs.text_line(stream.request.request_id, index)
        if line is not None:
            stream.lines[index] = line
            line.times.note_tokens(now)
        return line

    def end(self, request_id: str, error: Exception) -> None:
        """End a stream with an error. Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.live.clear()
            stream.error = error
            stream.changed.set()
            self._outputs.discard(request_id)
            self._clear(request_id)

    def end_all(self, error: QuireError) -> None:
        """End all streams with an error."""
        for request_id in list(self._streams):
            self.end(request_id, error)

    def count_death(self, death: Death) -> bool:
        """The engine process died: find the request at fault. Returns whether the time since the last death was of use:
        something was computed, or fewer requests are suspects now."""
        self._outputs.restart()
        self._stop_timer()
        useful, self._progress = self._progress, False
        if not death.while_loading:
            in_step = [
                request_id
                for request_id, stream in self._streams.items()
                if stream.is_sent and stream.live and (death.in_step is None or request_id in death.in_step)
            ]
            group = self._blame.group
            guilty = self._blame.count_death(in_step)
            if guilty is not None:
                self._condemn(guilty, death)
            useful = useful or guilty is not None or self._blame.group not in ((), group)
        return useful

    def resume(self) -> None:
        """Send the live requests that may run, with their tokens so far, to a new engine process."""
        for stream in self._streams.values():
            stream.is_sent = False
        self._release()

    def _release(self) -> None:
        """Send the requests that may run and that the engine process does not have."""
        for request_id, stream in self._streams.items():
            if stream.live and not stream.is_sent and self._blame.may_run(request_id):
                stream.is_sent = True
                stream.num_repeated_prompt_logprobs = stream.num_prompt_logprobs
                has_tokens = any(stream.live.values()) or len(stream.live) < stream.request.params.n
                self._send(Add(replace(stream.request, output_token_ids=stream.live) if has_tokens else stream.request))

    def start_timer(self) -> None:
        """The engine process can compute: from now on suspects run apart for `APART_SECONDS`."""
        self._stop_timer()
        if self._blame.group:
            self._apart = asyncio.get_running_loop().call_later(APART_SECONDS, self._move_on)

    def _stop_timer(self) -> None:
        if self._apart is not None:
            self._apart.cancel()
            self._apart = None

    def _move_on(self) -> None:
        self._blame.move_on()
        self._release()
        self.start_timer()

    def _clear(self, *request_ids: str) -> None:
        """These requests are no longer suspects. If there are no other suspects, all requests may run."""
        group = self._blame.group
        for request_id in request_ids:
            self._blame.clear(request_id)
        if group and not set(self._blame.group) <= set(group):
            self.start_timer()
        if self._blame.group != group:
            self._release()

    def _abort(self, stream: Stream) -> None:
        if stream.is_sent:
            self._send(Abort([stream.request.request_id]))
        self._clear(stream.request.request_id)

    def _expire(self, request_id: str, seconds: float) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream.live:
            self._abort(stream)
            self.end(request_id, DeadlineError(f"the request was not finished within its {seconds:g} seconds"))

    def _condemn(self, request_id: str, death: Death) -> None:
        request = self._streams[request_id].request
        self._quarantine.add(request)
        message = (
            f"the engine died again and again while it computed this request ({request_id}), at last with no other "
            f"suspect: {death.cause}. Requests like it are refused for {self._quarantine.seconds:.0f} s"
        )
        logger.error("quarantined: %s", message)
        self.end(request_id, QuarantinedError(message))


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
