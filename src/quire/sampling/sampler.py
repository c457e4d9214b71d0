"""Sampler: one step's logits in, one token per sequence out. The pipeline, in vLLM's order, is visible in `sample`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan

from torch import Tensor

from quire.sampling.batch import SamplingBatch, split_by_logprobs
from quire.sampling.logits_processors import BatchLogitsProcessor
from quire.sampling.logprobs import processed_logprobs, token_logprobs
from quire.sampling.ranking import top_tokens
from quire.sampling.state import SamplingState
from quire.step import BeamCandidates, TokenLogprobs, logprob_bytes

NO_TOKEN = -1
"""Stands where no token could be drawn."""


@dataclass(slots=True)
class SampleResult:
    """The lists run in parallel, one entry per row of logits. A row with an error has the token −1 and no logprobs.

    A beam has candidates instead of a token: the token −1 as well, and an entry in `candidates`.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[str | None]
    candidates: dict[int, BeamCandidates]


class Sampler:
    """Draws the next tokens of a batch. Holds no sequence's state, only the last batch's parameters as arrays."""

    def __init__(
        self, vocab_size: int, logprobs_memory: int, logits_processors: Sequence[BatchLogitsProcessor] = ()
    ) -> None:
        """`logprobs_memory` is in bytes: batches whose log-probabilities would need more are sampled in pieces."""
        self._vocab_size = vocab_size
        self._logprobs_memory = logprobs_memory
        self._states: Sequence[SamplingState] = []
        self._pieces: list[tuple[slice, SamplingBatch]] = []
        self._logits_processors = logits_processors

    def sample(self, logits: Tensor, states: Sequence[SamplingState], *, passing: bool = False) -> SampleResult:
        """Draw one token per row of `logits` [rows, vocabulary] float32, which may be overwritten. The list `states` is
        never changed afterwards.

        A row that holds NaN or +inf, or in which no token is left, gets an error; the others do not notice.
        `passing` states do not come again: what was gathered of those before them is kept.
        """
        pieces = self._gather(states) if passing else self._pieces_of(states)
        if len(pieces) == 1:
            return self._sample(logits, pieces[0][1])
        result = SampleResult([], [], [], {})
        for piece, batch in pieces:
            part = self._sample(logits[piece], batch)
            result.token_ids += part.token_ids
            result.logprobs += part.logprobs
            result.errors += part.errors
            result.candidates |= {piece.start + row: found for row, found in part.candidates.items()}
        return result

    def _sample(self, logits: Tensor, batch: SamplingBatch) -> SampleResult:
        if batch.only_draws:
            return _draw(logits, batch, {})
        logits, states = logits.contiguous(), batch.states
        raw = {k: logits[rows] for k, rows in batch.logprob_rows.items()}
        raw_beams = {row: logits[row].clone() for row in batch.reporting_beams}
        failures = batch.processors.apply(logits)
        beams = [group for group in batch.groups if group.is_beam]
        for group in beams:
            # What the request edits is the log-probability, as in transformers: scores add up over a whole beam.
            logits[group.place] = logits[group.place].log_softmax(dim=-1)
        if batch.edits.any:
            batch.edits.apply(logits.numpy())
        processed = {row: logits[row].clone() for row in batch.processed_rows}
        result = _draw(logits, batch, failures)
        token_ids, logprobs, errors, candidates = result.token_ids, result.logprobs, result.errors, result.candidates
        for group in beams:
            of_group = _find_candidates(logits[group.place], [states[row].num_candidates for row in group.rows])
            candidates.update(zip(group.rows, of_group, strict=True))
        for k, rows in batch.logprob_rows.items():
            reports = token_logprobs(raw[k], [token_ids[row] for row in rows], k)
            for row, report in zip(rows, reports, strict=True):
                logprobs[row] = report if errors[row] is None else None
        for row, edited in processed.items():
            if errors[row] is None:
                logprobs[row] = processed_logprobs(edited, token_ids[row], states[row].params)
        for row, found in candidates.items():
            if not isfinite(found.logprobs[0]):
                errors[row] = failures.get(row) or _grammar_error(states[row]) or explain_max_logit(found.logprobs[0])
            grammar = states[row].grammar
            if grammar is not None and grammar.complete:
                candidates[row] = found._replace(last=True)
        for row, k in batch.reporting_beams.items():
            candidates[row] = candidates[row]._replace(
                reports=self._report_beam(raw_beams[row], candidates[row].token_ids, k)
            )
        return result

    def _report_beam(self, logits: Tensor, token_ids: list[int], k: int) -> list[TokenLogprobs]:
        """What is told of each candidate of one beam, as many at a time as there is room for."""
        num_rows = max(1, self._logprobs_memory // logprob_bytes(self._vocab_size, k))
        reports: list[TokenLogprobs] = []
        for first in range(0, len(token_ids), num_rows):
            part = token_ids[first : first + num_rows]
            reports += token_logprobs(logits.expand(len(part), -1), part, k)
        return reports

    def _pieces_of(self, states: Sequence[SamplingState]) -> list[tuple[slice, SamplingBatch]]:
        # States compare by identity, so a list of the same ones is told without a look at any of them.
        if self._states != states:
            self._pieces = self._gather(states)
        self._states = states
        return self._pieces

    def _gather(self, states: Sequence[SamplingState]) -> list[tuple[slice, SamplingBatch]]:
        pieces = split_by_logprobs(states, self._vocab_size, self._logprobs_memory)
        return [(piece, SamplingBatch(states[piece], self._vocab_size, self._logits_processors)) for piece in pieces]


def _draw(logits: Tensor, batch: SamplingBatch, failures: Mapping[int, str]) -> SampleResult:
    """A token or an error for each row, but for those of beams. Where one way is all rows', no row is looked at."""
    num_rows = len(batch.states)
    result = SampleResult([NO_TOKEN] * num_rows, [None] * num_rows, [None] * num_rows, {})
    uniforms = batch.uniforms()
    for group in batch.groups:
        if group.is_beam:
            continue
        if len(group.rows) == num_rows:
            result.token_ids, peaks = group.find(logits, uniforms)
        else:
            token_ids, peaks = group.find(logits[group.place], uniforms[group.place])
            for row, token_id in zip(group.rows, token_ids, strict=True):
                result.token_ids[row] = token_id
        if all(map(isfinite, peaks)):
            continue
        for row, peak in zip(group.rows, peaks, strict=True):
            if not isfinite(peak):
                result.token_ids[row] = NO_TOKEN
                result.errors[row] = failures.get(row) or _grammar_error(batch.states[row]) or explain_max_logit(peak)
    return result


def _find_candidates(scores: Tensor, num_candidates: Sequence[int]) -> list[BeamCandidates]:
    """The most likely tokens of each row of log-probabilities, as many as it asks for."""
    values, ids = top_tokens(scores, max(num_candidates))
    return [
        BeamCandidates(row_ids[:count], row_values[:count], [])
        for row_values, row_ids, count in zip(values.tolist(), ids.tolist(), num_candidates, strict=True)
    ]


def _grammar_error(state: SamplingState) -> str | None:
    return state.grammar.error if state.grammar is not None else None


def explain_max_logit(peak: float) -> str:
    """Why nothing can be drawn from a row of which this is the highest logit."""
    if peak == -inf:
        return (
            "no token is left to sample: every logit is −inf after structured_outputs, allowed_token_ids, bad_words "
            "and min_tokens"
        )
    return f"the model's logits hold {'NaN' if isnan(peak) else '+inf'}; the sequence cannot go on"
