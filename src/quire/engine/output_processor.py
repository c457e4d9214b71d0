"""OutputProcessor: turns token ids from the engine core into text and RequestOutputs; ends samples at stop strings."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from quire.engine.detokenizer import Detokenizer
from quire.engine.tokenizer import Tokenizer
from quire.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    SequenceDelta,
    StepDeltas,
)
from quire.request import FinishReason, Request
from quire.step import TokenLogprobs


class _Sample:
    """One sample's text so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.num_tokens = 0
        """Output tokens so far; counted only where a stop string may end them."""
        self.whole: CompletionOutput | None = None
        """The sample's part of its request's `whole`."""
        self.ids: list[int] | None = None
        """`whole.token_ids` if a token changes nothing else (no text); tokens are appended in place."""
        self.cumulative_logprob = 0.0
        self.shows_stop_token = request.params.include_stop_str_in_output
        self.detokenizer = (
            Detokenizer(tokenizer, request.params, request.prompt_token_ids)
            if tokenizer is not None and request.params.detokenize
            else None
        )
        self.next_text = None if self.detokenizer is None or self.detokenizer.has_stops else self.detokenizer.next_text
        """Turns one token into its text; None if more than that may happen."""


class _RequestState:
    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None, *, grows: bool) -> None:
        self.request = request
        self.prompt = prompt
        self.live = {index: _Sample(request, tokenizer) for index in range(request.params.n)}
        """Samples that have not ended, by index."""
        self.num_cached_tokens = 0
        self.prompt_logprobs_begun = False
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.whole = self.open() if grows or request.num_returned else None
        """The whole output so far: if outputs grow, or if only the best samples will be returned."""

    def open(self) -> RequestOutput:
        """An output with nothing in it yet."""
        prompt_token_ids = self.request.prompt_token_ids
        return RequestOutput(self.request.request_id, self.prompt, prompt_token_ids, [], metrics=self.metrics)


class TextLine(NamedTuple):
    """Turns the tokens of one sample into texts."""

    next: Callable[[int], str]
    """The text of the next token. Log when it came in `times`."""
    times: RequestMetrics


class _Growing(NamedTuple):
    """Samples whose outputs grow by token ids only."""

    token_ids: list[list[int]]
    """The token ids of each sample so far, to append to."""
    outputs: list[RequestOutput]
    """The outputs of their requests, each once."""


class OutputProcessor:
    """Owns the text side of every request in flight."""

    def __init__(
        self, tokenizer: Tokenizer | None, clock: Callable[[], float] = time.monotonic, *, outputs_grow: bool = False
    ) -> None:
        """Outputs are deltas (see `RequestOutput.extend`), or with `outputs_grow` one growing output per request."""
        self._outputs_grow = outputs_grow
        self._tokenizer = tokenizer
        self._clock = clock
        self._states: dict[str, _RequestState] = {}
        self._batch_id = 0
        """The last `StepDeltas.batch_id`; 0 if it no longer says anything about the samples."""
        self._growing: _Growing | None = None
        """The samples of that batch, if all of them grow by token ids only."""

    def __len__(self) -> int:
        return len(self._states)

    def add(self, request: Request, prompt: str | None) -> RequestOutput:
        """Returns the request's output, still empty."""
        state = _RequestState(request, prompt, self._tokenizer, grows=self._outputs_grow)
        self._states[request.request_id] = state
        return state.whole or state.open()

    def discard(self, request_id: str) -> None:
        """Remove an aborted request."""
        self._states.pop(request_id, None)
        self._batch_id = 0

    def restart(self) -> None:
        """A new engine core comes next; it numbers its batches from the beginning."""
        self._batch_id = 0

    def process(self, deltas: StepDeltas) -> tuple[Sequence[RequestOutput], list[tuple[str, int]]]:
        """The outputs that changed, and the samples (request id, index) that a stop string ended: the core must stop
        them."""
        outputs: dict[str, RequestOutput] = {}
        stopped: list[tuple[str, int]] = []
        now = self._clock()
        for delta in deltas.others:
            self._take(delta, now, outputs, stopped)
        if not deltas.batch_id or deltas.batch_id != self._batch_id:
            self._batch_id, self._growing = deltas.batch_id, self._find_growing(deltas.samples)
        growing = self._growing
        if growing is None:
            for (request_id, index), token_id in zip(deltas.samples, deltas.token_ids, strict=True):
                if not self._take_token(request_id, index, token_id, now, outputs):
                    self._take(SequenceDelta(request_id, index, [token_id]), now, outputs, stopped)
            return list(outputs.values()), stopped
        # Usually the batch is that of the step before: then each sample costs one append.
        for ids, token_id in zip(growing.token_ids, deltas.token_ids, strict=True):
            ids.append(token_id)
        if not outputs:
            return growing.outputs, stopped
        outputs.update((output.request_id, output) for output in growing.outputs)
        return list(outputs.values()), stopped

    def _find_growing(self, samples: list[tuple[str, int]]) -> _Growing | None:
        token_ids: list[list[int]] = []
        outputs: dict[str, RequestOutput] = {}
        for request_id, index in samples:
            state = self._states.get(request_id)
            sample = state.live.get(index) if state is not None else None
            if state is None or state.whole is None or sample is None or sample.ids is None:
                return None
            token_ids.append(sample.ids)
            outputs[request_id] = state.whole
        return _Growing(token_ids, list(outputs.values()))

    def _take_token(
        self, request_id: str, index: int, token_id: int, now: float, outputs: dict[str, RequestOutput]
    ) -> bool:
        """What `_take` does for one token, in the case of nearly all: a stream's next token, and no stop strings.
        Returns False for others."""
        line = self.text_line(request_id, index)
        if line is None:
            return False
        text = line.next(token_id)
        line.times.note_tokens(now)
        output = outputs.get(request_id)
        if output is None:
            state = self._states[request_id]
            output = outputs[request_id] = state.open()
            output.num_cached_tokens = state.num_cached_tokens
        output.outputs.append(CompletionOutput(index, text, [token_id]))
        return True

    def text_line(self, request_id: str, index: int) -> TextLine | None:
        """What turns the tokens of a sample into texts, if nothing but a text comes of them until it ends."""
        state = self._states.get(request_id)
        sample = state.live.get(index) if state is not None else None
        if state is None or sample is None or sample.next_text is None or state.whole is not None:
            return None
        return TextLine(sample.next_text, state.metrics)

    def _take(
        self, delta: SequenceDelta, now: float, outputs: dict[str, RequestOutput], stopped: list[tuple[str, int]]
    ) -> None:
        state = self._states.get(delta.request_id)
        sample = state.live.get(delta.index) if state is not None else None
        if state is None or sample is None:
            return  # the request was aborted or its text reached a stop string while this token was under way
        output = outputs.get(delta.request_id)
        if output is None:
            output = self._open(state, delta, now)
            if not state.request.num_returned:
                outputs[delta.request_id] = output
        if delta.prompt_logprobs is not None:
            if output.prompt_logprobs is None:
                output.prompt_logprobs = [] if state.prompt_logprobs_begun else [None]
            output.prompt_logprobs += [self._logprobs(entry) for entry in delta.prompt_logprobs]
            state.prompt_logprobs_begun = True
            if not delta.token_ids and delta.finish_reason is None:
                return
        params = state.request.params
        if params.prompt_logprobs is not None and not state.prompt_logprobs_begun:  # a prompt of one token
            output.prompt_logprobs = [None]
            state.prompt_logprobs_begun = True
        output.vector = delta.vector
        completion = sample.whole
        if completion is None:
            completion = CompletionOutput(delta.index)
            output.outputs.append(completion)
            if state.whole is not None:
                sample.whole = completion
                if sample.detokenizer is None and not state.request.num_returned:
                    sample.ids = completion.token_ids
        self._extend(completion, sample, delta)
        if completion.finish_reason is not None:
            del state.live[delta.index]
            if delta.finish_reason is None:
                stopped.append((delta.request_id, delta.index))
            if not state.live:
                output.finished = True
                del self._states[delta.request_id]
                if state.request.num_returned:
                    _keep_best(output, state.request)
                    outputs[delta.request_id] = output

    def _open(self, state: _RequestState, delta: SequenceDelta, now: float) -> RequestOutput:
        metrics, counts = state.metrics, delta.counts
        if delta.token_ids:
            metrics.note_tokens(now)
        if counts is not None:
            state.num_cached_tokens = max(0, counts.num_cached_tokens)
            if delta.token_ids or delta.vector is not None:
                metrics.first_scheduled_time = counts.first_scheduled_time
                metrics.num_preemptions = counts.num_preemptions
                metrics.num_draft_tokens = counts.num_draft_tokens
                metrics.num_accepted_tokens = counts.num_accepted_tokens
        output = state.whole or state.open()
        output.num_cached_tokens = state.num_cached_tokens
        return output

    def _extend(self, completion: CompletionOutput, sample: _Sample, delta: SequenceDelta) -> None:
        token_ids, logprobs = delta.token_ids, delta.logprobs
        finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
        if sample.detokenizer is not None:
            ended_by_token = finish_reason == FinishReason.STOP and not delta.ends_with_text
            shown = token_ids[:-1] if ended_by_token and not sample.shows_stop_token else token_ids
            match = sample.detokenizer.append(shown, finished=finish_reason is not None)
            if match is not None:
                finish_reason, completion.stop_reason = FinishReason.STOP, match.stop
                token_ids = token_ids[: match.num_tokens - sample.num_tokens]
                stop_reason = None
            completion.text += sample.detokenizer.delta()
            sample.num_tokens += len(token_ids)
        completion.token_ids += token_ids
        completion.finish_reason = finish_reason
        completion.error = delta.error
        if stop_reason is not None:
            completion.stop_reason = stop_reason
        if logprobs is not None:
            logprobs = logprobs[: len(token_ids)]
            sample.cumulative_logprob += sum(entry.logprobs[0] for entry in logprobs)
            if completion.logprobs is None:
                completion.logprobs = []
            completion.logprobs += [self._logprobs(entry) for entry in logprobs]
            completion.cumulative_logprob = sample.cumulative_logprob
        if delta.cumulative_logprob is not None:
            completion.cumulative_logprob = delta.cumulative_logprob

    def _logprobs(self, entry: TokenLogprobs) -> PositionLogprobs:
        tokenizer = self._tokenizer
        return {
            token_id: Logprob(logprob, rank, tokenizer.id_to_text(token_id) if tokenizer is not None else None)
            for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True)
        }


def _keep_best(output: RequestOutput, request: Request) -> None:
    """Keep the `num_returned` best samples, best first. Failed samples come last."""
    output.outputs.sort(
        key=lambda sample: (sample.error is not None, -(sample.cumulative_logprob or 0.0), sample.index)
    )
    del output.outputs[request.num_returned :]
    for index, sample in enumerate(output.outputs):
        sample.index = index
        if request.hides_logprobs:
            sample.logprobs = None
