"""Sampler: one step's logits in, one token per sequence out. The pipeline, in vLLM's order, is visible in `sample`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from quire.sampling.batch import RowGroup, SamplingBatch
from quire.sampling.draws import FloatArray, IntArray, draw_top_k, draw_top_p, draw_unfiltered
from quire.sampling.logprobs import token_logprobs
from quire.sampling.ranking import leading_tokens
from quire.sampling.state import Draw, SamplingState
from quire.step import BeamCandidates, TokenLogprobs

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

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._batch = SamplingBatch([], vocab_size)

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> SampleResult:
        """Draw one token per row of `logits` [rows, vocabulary] float32, which may be overwritten.

        A row that holds NaN or +inf, or in which no token is left, gets an error; the others do not notice.
        """
        batch = self._batch_of(states)
        logits = logits.contiguous()
        raw = {k: logits[rows] for k, rows in batch.logprob_rows.items()}
        raw_beams = {row: logits[row].clone() for row in batch.reporting_beams}
        for group in batch.groups:
            if group.draw is Draw.BEAM:
                # What the request edits is the log-probability, as in transformers: scores add up over a whole beam.
                logits[group.place] = logits[group.place].log_softmax(dim=-1)
        batch.edits.apply(logits.numpy())
        token_ids = np.full(len(states), NO_TOKEN, dtype=np.int64)
        errors: list[str | None] = [None] * len(states)
        uniform = batch.uniforms()
        candidates: dict[int, BeamCandidates] = {}
        for group in batch.groups:
            if group.draw is Draw.BEAM:
                num_candidates = [states[row].num_candidates for row in group.rows]
                of_group = _find_candidates(logits[group.place], num_candidates)
                candidates.update(zip(group.rows.tolist(), of_group, strict=True))
                continue
            tokens, peaks = _draw(group, logits, uniform[group.rows])
            sound = np.isfinite(peaks)
            token_ids[group.rows] = np.where(sound, tokens, NO_TOKEN)
            for place in np.flatnonzero(~sound):
                errors[group.rows[place]] = _explain(float(peaks[place]))
        logprobs: list[TokenLogprobs | None] = [None] * len(states)
        for k, rows in batch.logprob_rows.items():
            reports = token_logprobs(raw[k], token_ids[rows].tolist(), k)
            for row, report in zip(rows, reports, strict=True):
                logprobs[row] = report if errors[row] is None else None
        for row, found in candidates.items():
            if not np.isfinite(found.logprobs[0]):
                errors[row] = _explain(found.logprobs[0])
        for row, k in batch.reporting_beams.items():
            ids = candidates[row].token_ids
            reports = token_logprobs(raw_beams[row].expand(len(ids), -1), ids, k)
            candidates[row] = candidates[row]._replace(reports=reports)
        return SampleResult(token_ids.tolist(), logprobs, errors, candidates)

    def _batch_of(self, states: Sequence[SamplingState]) -> SamplingBatch:
        # States compare by identity, so this is a short scan, and the batch keeps them from being replaced unseen.
        if self._batch.states != list(states):
            self._batch = SamplingBatch(states, self._vocab_size)
        return self._batch


def _draw(group: RowGroup, logits: Tensor, uniform: FloatArray) -> tuple[IntArray, FloatArray]:
    """A token and the highest logit of each row of the group; where the logit is not finite, the token is void."""
    scores = logits[group.place]
    if group.draw is Draw.GREEDY:
        values = scores.numpy()
        best = values.argmax(axis=1)  # the lowest id among equals; NaN counts as highest
        return best, np.take_along_axis(values, best[:, None], axis=1)[:, 0].astype(np.float64)
    peaks = scores.amax(dim=-1, keepdim=True)
    # Shifting first keeps what matters, the small differences between likely tokens, exact at any temperature. It turns
    # a row whose peak is not finite into NaN, which no comparison of a draw is true of: such a row draws some valid id.
    scores.sub_(peaks)
    if group.temperatures is not None:
        scores.div_(group.temperatures)
    match group.draw:
        case Draw.UNFILTERED:
            tokens = draw_unfiltered(scores, group.min_p, uniform)
        case Draw.TOP_K:
            tokens = draw_top_k(scores, group.min_p, group.top_k, group.top_p, uniform)
        case Draw.TOP_P:
            tokens = draw_top_p(scores, group.min_p, group.top_p, uniform)
    return tokens, peaks.squeeze(1).numpy().astype(np.float64)


def _find_candidates(scores: Tensor, num_candidates: Sequence[int]) -> list[BeamCandidates]:
    """The most likely tokens of each row of log-probabilities, as many as it asks for."""
    values, ids = leading_tokens(scores, max(num_candidates))
    return [
        BeamCandidates(row_ids[:count], row_values[:count], [])
        for row_values, row_ids, count in zip(values.tolist(), ids.tolist(), num_candidates, strict=True)
    ]


def _explain(peak: float) -> str:
    if peak == -np.inf:
        return "no token is left to sample: every logit is −inf after allowed_token_ids, bad_words and min_tokens"
    return f"the model's logits hold {'NaN' if np.isnan(peak) else '+inf'}; the sequence cannot go on"
