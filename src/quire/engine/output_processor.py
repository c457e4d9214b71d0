"""OutputProcessor: token ids as they leave the engine core → text, stop strings, log-probabilities, RequestOutputs."""

import time
from collections.abc import Callable, Sequence

from quire.engine.detokenizer import Detokenizer
from quire.engine.tokenizer import Tokenizer
from quire.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestMetrics, RequestOutput, SequenceDelta
from quire.request import FinishReason, Request
from quire.step import TokenLogprobs


class _Sample:
    """One sample's text so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.num_tokens = 0
        self.cumulative_logprob = 0.0
        self.shows_stop_token = request.params.include_stop_str_in_output
        self.detokenizer = (
            Detokenizer(tokenizer, request.params, request.prompt_token_ids)
            if tokenizer is not None and request.params.detokenize
            else None
        )


class _RequestState:
    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.prompt = prompt
        self.live = {index: _Sample(request, tokenizer) for index in range(request.params.n)}
        """Samples that have not ended."""
        self.prompt_logprobs_begun = False
        self.whole: RequestOutput | None = None
        """Everything so far of a request of which only the best samples are returned."""
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)


class OutputProcessor:
    """Owns the text side of every request in flight; its outputs are deltas (see `RequestOutput.extend`)."""

    def __init__(self, tokenizer: Tokenizer | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokenizer = tokenizer
        self._clock = clock
        self._states: dict[str, _RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def add(self, request: Request, prompt: str | None) -> None:
        self._states[request.request_id] = _RequestState(request, prompt, self._tokenizer)

    def discard(self, request_id: str) -> None:
        """Forget a request that was aborted."""
        self._states.pop(request_id, None)

    def process(self, deltas: Sequence[SequenceDelta]) -> tuple[list[RequestOutput], list[tuple[str, int]]]:
        """What each request gained, and the (request id, sample) pairs that a stop string ended, for the core."""
        outputs: dict[str, RequestOutput] = {}
        states: dict[str, _RequestState] = {}
        stopped: list[tuple[str, int]] = []
        now = self._clock()
        for delta in deltas:
            state = self._states.get(delta.request_id)
            sample = state.live.get(delta.index) if state is not None else None
            if state is None or sample is None:
                continue  # aborted, or stopped by its text while this token was on its way
            output = outputs.get(delta.request_id)
            if output is None:
                output = outputs[delta.request_id] = self._open(state, delta, now)
                if state.request.num_returned:
                    states[delta.request_id] = state
            if delta.prompt_logprobs is not None:
                output.prompt_logprobs = [] if state.prompt_logprobs_begun else [None]
                output.prompt_logprobs += [self._logprobs(entry) for entry in delta.prompt_logprobs]
                state.prompt_logprobs_begun = True
                if not delta.token_ids and delta.finish_reason is None:
                    continue
            completion = self._extend(sample, delta)
            output.outputs.append(completion)
            if completion.finish_reason is not None:
                del state.live[delta.index]
                if delta.finish_reason is None:
                    stopped.append((delta.request_id, delta.index))
                if not state.live:
                    output.finished = True
                    del self._states[delta.request_id]
        for request_id, state in states.items():
            best = _take_best(state, outputs.pop(request_id))
            if best is not None:
                outputs[request_id] = best
        return list(outputs.values()), stopped

    def _open(self, state: _RequestState, delta: SequenceDelta, now: float) -> RequestOutput:
        metrics = state.metrics
        if delta.token_ids:
            metrics.first_scheduled_time = delta.first_scheduled_time
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
            metrics.num_preemptions = delta.num_preemptions
            metrics.num_draft_tokens = delta.num_draft_tokens
            metrics.num_accepted_tokens = delta.num_accepted_tokens
        return RequestOutput(
            request_id=delta.request_id,
            prompt=state.prompt,
            prompt_token_ids=state.request.prompt_token_ids,
            outputs=[],
            num_cached_tokens=max(0, delta.num_cached_tokens),
            metrics=metrics,
        )

    def _extend(self, sample: _Sample, delta: SequenceDelta) -> CompletionOutput:
        token_ids, logprobs = delta.token_ids, delta.logprobs
        finish_reason, stop_reason = delta.finish_reason, delta.stop_reason
        completion = CompletionOutput(index=delta.index, error=delta.error)
        if sample.detokenizer is not None:
            ended_by_token = finish_reason == FinishReason.STOP and not delta.ends_with_text
            shown = token_ids[:-1] if ended_by_token and not sample.shows_stop_token else token_ids
            match = sample.detokenizer.append(shown, finished=finish_reason is not None)
            if match is not None:
                finish_reason, completion.stop_reason = FinishReason.STOP, match.stop
                token_ids = token_ids[: match.num_tokens - sample.num_tokens]
                stop_reason = None
            completion.text = sample.detokenizer.delta()
        sample.num_tokens += len(token_ids)
        completion.token_ids = token_ids
        completion.finish_reason = finish_reason
        if stop_reason is not None:
            completion.stop_reason = stop_reason
        if logprobs is not None:
            logprobs = logprobs[: len(token_ids)]
            sample.cumulative_logprob += sum(entry.logprobs[0] for entry in logprobs)
            completion.logprobs = [self._logprobs(entry) for entry in logprobs]
            completion.cumulative_logprob = sample.cumulative_logprob
        if delta.cumulative_logprob is not None:
            completion.cumulative_logprob = delta.cumulative_logprob
        return completion

    def _logprobs(self, entry: TokenLogprobs) -> PositionLogprobs:
        tokenizer = self._tokenizer
        return {
            token_id: Logprob(logprob, rank, tokenizer.id_to_text(token_id) if tokenizer is not None else None)
            for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True)
        }


def _take_best(state: _RequestState, news: RequestOutput) -> RequestOutput | None:
    """Keep what is new; once all samples have ended, the whole output with the best of them, best first.

    A sample that failed is returned only where too few others are left.
    """
    if state.whole is None:
        state.whole = news
    else:
        state.whole.extend(news)
    whole, request = state.whole, state.request
    if not news.finished:
        return None
    whole.outputs.sort(key=lambda sample: (sample.error is not None, -(sample.cumulative_logprob or 0.0), sample.index))
    del whole.outputs[request.num_returned :]
    for index, sample in enumerate(whole.outputs):
        sample.index = index
        if request.hides_logprobs:
            sample.logprobs = None
    return whole
