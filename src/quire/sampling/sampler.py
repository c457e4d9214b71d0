"""Sampler: samples on the host. One step's logits in, one token per sequence out; `_sample_batch` shows the pipeline,
in vLLM's order."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan

from torch import Tensor

from quire.errors import NO_TOKEN_LEFT
from quire.kernels.interface import Kernels
from quire.sampling.batch import FloatArray, SamplingBatch, split_by_logprobs
from quire.sampling.logits_processors import BatchLogitsProcessor
from quire.sampling.logprobs import processed_logprobs, token_logprobs
from quire.sampling.ranking import top_tokens
from quire.sampling.state import SamplingState
from quire.sampling_params import SamplingParams
from quire.step import BeamCandidates, TokenLogprobs, logprob_bytes

logger = logging.getLogger(__name__)

NO_TOKEN = -1
"""The token of a row that could not be sampled."""


@dataclass(slots=True)
class SampleResult:
    """What was sampled: parallel lists, one entry per row of logits.

    A row with an error has NO_TOKEN and no log-probabilities. A beam has NO_TOKEN and an entry in `candidates`.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[str | None]
    candidates: dict[int, BeamCandidates]


class Sampler:
    """Samples the next tokens of a batch. Holds no sequence's state, only the parameters of one batch as arrays."""

    def __init__(
        self,
        vocab_size: int,
        logprobs_memory: int,
        kernels: Kernels,
        logits_processors: Sequence[BatchLogitsProcessor] = (),
    ) -> None:
        """`logprobs_memory` is in bytes: batches whose log-probabilities need more are sampled in pieces."""
        self._vocab_size = vocab_size
        self._logprobs_memory = logprobs_memory
        self._kernels = kernels
        self._logits_processors = logits_processors
        self._states_id = 0
        self._pieces: list[tuple[slice, SamplingBatch]] = []
        """The batch of `_states_id`, in pieces of `logprobs_memory`."""

    def sample(self, logits: Tensor, states: Sequence[SamplingState], states_id: int = 0) -> SampleResult:
        """Sample one token per row of `logits` [rows, vocabulary] float32, which may be overwritten.

        A non-zero `states_id` stands for these states in this order: what was built for them is used again in the next
        call with the same id. With 0 nothing is kept.

        A row that holds NaN or +inf, in which no token is left, or whose state is faulty gets an error. Other rows are
        not affected.
        """
        try:
            return self._sample(logits, states, states_id)
        except Exception:
            faults = self._find_faults(states)
            if not faults:
                raise
        # States are read before a logit is changed, so the other rows are as the model made them.
        sound = [row for row in range(len(states)) if row not in faults]
        found = self._sample(logits[sound], [states[row] for row in sound], 0) if sound else None
        return _spread(found, sound, faults, len(states))

    def _find_faults(self, states: Sequence[SamplingState]) -> dict[int, str]:
        """Rows whose states cannot be read → why."""
        faults: dict[int, str] = {}
        for row, state in enumerate(states):
            try:
                batch = SamplingBatch([state], self._vocab_size, self._kernels, self._logits_processors)
                batch.edits.read()
                batch.uniforms()
            except Exception as error:
                logger.exception("a row could not be sampled, and its sample ends")
                faults[row] = f"the sampler failed for this sample ({type(error).__name__}); the server's log says how"
        return faults

    def _sample(self, logits: Tensor, states: Sequence[SamplingState], states_id: int) -> SampleResult:
        pieces = self._batches(states, states_id)
        if len(pieces) == 1:
            return self._sample_batch(logits, pieces[0][1])
        result = SampleResult([], [], [], {})
        for piece, batch in pieces:
            part = self._sample_batch(logits[piece], batch)
            result.token_ids += part.token_ids
            result.logprobs += part.logprobs
            result.errors += part.errors
            result.candidates |= {piece.start + row: found for row, found in part.candidates.items()}
        return result

    def _batches(self, states: Sequence[SamplingState], states_id: int) -> list[tuple[slice, SamplingBatch]]:
        if states_id and states_id == self._states_id:
            return self._pieces
        size, memory = self._vocab_size, self._logprobs_memory
        pieces = [
            (piece, SamplingBatch(states[piece], size, self._kernels, self._logits_processors))
            for piece in split_by_logprobs(states, size, memory)
        ]
        if states_id:
            self._states_id, self._pieces = states_id, pieces
        return pieces

    def _sample_batch(self, logits: Tensor, batch: SamplingBatch) -> SampleResult:
        if batch.needs_tokens_only:
            return _sample_tokens(logits, batch, batch.uniforms(), {})
        logits, states = logits.contiguous(), batch.states
        step, uniforms = batch.edits.read(), batch.uniforms()
        raw = {k: logits[rows] for k, rows in batch.logprob_rows.items()}
        raw_beams = {row: logits[row].clone() for row in batch.logprob_beams}
        failures = batch.processors.apply(logits)
        beams = [group for group in batch.groups if group.is_beam]
        for group in beams:
            # The request's edits change the log-probability, as in transformers: scores add up over a whole beam.
            logits[group.index] = logits[group.index].log_softmax(dim=-1)
        if batch.edits.any:
            batch.edits.apply(logits.numpy(), step)
        processed = {row: logits[row].clone() for row in batch.processed_rows}
        result = _sample_tokens(logits, batch, uniforms, failures)
        token_ids, errors = result.token_ids, result.errors
        for k, rows in batch.logprob_rows.items():
            found = token_logprobs(raw[k], [token_ids[row] for row in rows], k)
            for row, logprobs in zip(rows, found, strict=True):
                result.logprobs[row] = logprobs if errors[row] is None else None
        for row, edited in processed.items():
            if errors[row] is None:
                result.logprobs[row] = processed_logprobs(edited, token_ids[row], states[row].params)
        for group in beams:
            found_beams = _find_candidates(logits[group.index], [states[row].num_candidates for row in group.rows])
            for row, candidates in zip(group.rows, found_beams, strict=True):
                self._add_candidates(result, row, candidates, batch, raw_beams.get(row), failures)
        return result

    def _add_candidates(
        self,
        result: SampleResult,
        row: int,
        found: BeamCandidates,
        batch: SamplingBatch,
        raw_logits: Tensor | None,
        failures: Mapping[int, str],
    ) -> None:
        """Put the candidates of one beam into `result`, or why it has none. `raw_logits` are the model's own, if the
        beam asks for log-probabilities."""
        state = batch.states[row]
        if not isfinite(found.logprobs[0]):
            result.errors[row] = _explain(state, failures.get(row), found.logprobs[0])
        if state.grammar is not None and state.grammar.complete:
            found = found._replace(last=True)
        if raw_logits is not None:
            logprobs = self._candidate_logprobs(raw_logits, found.token_ids, batch.logprob_beams[row])
            found = found._replace(reports=logprobs)
        result.candidates[row] = found

    def _candidate_logprobs(self, logits: Tensor, token_ids: list[int], k: int) -> list[TokenLogprobs]:
        """Log-probabilities of each candidate of one beam, as many at a time as there is memory for."""
        num_rows = max(1, self._logprobs_memory // logprob_bytes(self._vocab_size, k))
        logprobs: list[TokenLogprobs] = []
        for first in range(0, len(token_ids), num_rows):
            part = token_ids[first : first + num_rows]
            logprobs += token_logprobs(logits.expand(len(part), -1), part, k)
        return logprobs


def _spread(found: SampleResult | None, rows: Sequence[int], faults: Mapping[int, str], num_rows: int) -> SampleResult:
    """What was found for `rows` of a batch, with an error in each other row."""
    errors = [faults.get(row) for row in range(num_rows)]
    result = SampleResult([NO_TOKEN] * num_rows, [None] * num_rows, errors, {})
    if found is None:
        return result
    for place, row in enumerate(rows):
        result.token_ids[row], result.logprobs[row] = found.token_ids[place], found.logprobs[place]
        result.errors[row] = found.errors[place]
        if place in found.candidates:
            result.candidates[row] = found.candidates[place]
    return result


def _sample_tokens(
    logits: Tensor, batch: SamplingBatch, uniforms: FloatArray, failures: Mapping[int, str]
) -> SampleResult:
    """A token or an error for each row that is not a beam. If all rows are one group, no row is looked at alone."""
    num_rows = len(batch.states)
    result = SampleResult([NO_TOKEN] * num_rows, [None] * num_rows, [None] * num_rows, {})
    for group in batch.groups:
        if group.is_beam:
            continue
        if len(group.rows) == num_rows:
            result.token_ids, max_logits = group.sample(logits, uniforms)
        else:
            token_ids, max_logits = group.sample(logits[group.index], uniforms[group.index])
            for row, token_id in zip(group.rows, token_ids, strict=True):
                result.token_ids[row] = token_id
        if all(map(isfinite, max_logits)):
            continue
        for row, max_logit in zip(group.rows, max_logits, strict=True):
            if not isfinite(max_logit):
                result.token_ids[row] = NO_TOKEN
                result.errors[row] = _explain(batch.states[row], failures.get(row), max_logit)
    return result


def _find_candidates(scores: Tensor, num_candidates: Sequence[int]) -> list[BeamCandidates]:
    """The most likely tokens of each row of log-probabilities, `num_candidates` of them."""
    values, ids = top_tokens(scores, max(num_candidates))
    return [
        BeamCandidates(row_ids[:count], row_values[:count], [])
        for row_values, row_ids, count in zip(values.tolist(), ids.tolist(), num_candidates, strict=True)
    ]


def _explain(state: SamplingState, failure: str | None, max_logit: float) -> str:
    """Why nothing can be sampled from a row. `failure` is that of a logits processor."""
    grammar_error = state.grammar.error if state.grammar is not None else None
    return failure or grammar_error or explain_max_logit(max_logit, state.params)


def explain_max_logit(max_logit: float, params: SamplingParams) -> str:
    """Why nothing can be sampled from a row with this highest logit, which is not finite."""
    if max_logit == -inf:
        fields = _excluding_fields(params)
        if not fields:
            return f"{NO_TOKEN_LEFT}: every logit is −inf"
        return f"{NO_TOKEN_LEFT}: {' and '.join(fields)} forbid all; leave one of them out"
    return f"the model's logits hold {'NaN' if isnan(max_logit) else '+inf'}; the sequence cannot go on"


def _excluding_fields(params: SamplingParams) -> list[str]:
    """The fields of the request that forbid tokens."""
    constraint = params.structured_outputs
    fields = {
        "structured_outputs" if constraint is None else constraint.asked_as: constraint is not None,
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": bool(params.bad_words),
        "min_tokens": params.min_tokens > 0,
    }
    return [name for name, is_set in fields.items() if is_set]
