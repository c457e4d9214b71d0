"""BeamSearch: which beams of one request go on, which are finished, and when the search is over.

It knows nothing of memory or rows.

The rules are those of Hugging Face transformers' `generate(num_beams=width)`, so that tokens and scores compare:

- A candidate is a live beam plus one token; its score is the sum of its log-probabilities. Candidates are sorted, best
  first. The first `width` candidates that do not end a sequence are the next live beams. Candidates that end a sequence
  are finished if they are among the first `width` of all.
- A finished sequence of L tokens is ranked by score / L ** length_penalty; the best `width` are kept.
- Once `width` are finished, the search goes on only while the best live beam could still beat the worst of them. It is
  judged at its present length, or with `early_stopping="never"` and a positive penalty at the longest length allowed.
  `early_stopping=True` ends the search as soon as `width` are finished.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quire.request import FinishReason, Request
from quire.step import BeamCandidates, TokenLogprobs


class Survivor(NamedTuple):
    """A live beam of the next step: one of the present beams and the token that follows it."""

    parent: int
    """Index into the present live beams."""
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    """cumulative_logprob / len(token_ids) ** length_penalty; hypotheses are ranked by it."""
    finish_reason: FinishReason
    stop_reason: int | None
    logprobs: list[TokenLogprobs] | None


@dataclass(frozen=True, slots=True)
class _Beam:
    token_ids: list[int]
    score: float
    logprobs: list[TokenLogprobs] | None


class BeamSearch:
    """The search of one request, from the end of its prompt. Live beams are numbered, 0 the best."""

    def __init__(self, request: Request) -> None:
        params = request.params
        assert params.beam_width is not None, "a request without a beam width is sampled"
        self.width = params.beam_width
        self.done = False
        self._length_penalty = params.length_penalty
        self._early_stopping = params.early_stopping
        self._max_tokens = request.max_tokens
        self._eos_token_ids = frozenset(request.eos_token_ids)
        self._enders = self._eos_token_ids | frozenset(params.stop_token_ids)
        self._beams = [_Beam([], 0.0, None if params.logprobs is None else [])]
        self._finished: list[Hypothesis] = []

    def advance(self, candidates: Sequence[BeamCandidates]) -> list[Survivor]:
        """Advance by one token. `candidates` has one entry per live beam, in their order.

        Each entry holds at least `width` tokens that end no sequence, or all tokens that can follow the beam. Returns
        the next live beams; none if the search is over.
        """
        length = len(self._beams[0].token_ids) + 1
        at_limit = length >= self._max_tokens
        live: list[tuple[float, int, int]] = []
        for rank, (score, beam, place) in enumerate(self._by_score(candidates)):
            token_id = candidates[beam].token_ids[place]
            if at_limit or token_id in self._enders or candidates[beam].last:
                if rank < self.width:
                    self._finish(beam, candidates[beam], place, score)
            else:
                live.append((score, beam, place))
            if rank >= self.width - 1 and (len(live) >= self.width or at_limit):
                break
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self.width :]
        if not live or self._is_over(live[0][0], length):
            self.done = True
            return []
        survivors = [Survivor(beam, candidates[beam].token_ids[place]) for _, beam, place in live]
        self._beams = [
            _Beam(
                [*self._beams[beam].token_ids, candidates[beam].token_ids[place]],
                score,
                self._logprobs_with(beam, candidates[beam], place),
            )
            for score, beam, place in live
        ]
        return survivors

    def hypotheses(self, count: int) -> list[Hypothesis]:
        """The best finished sequences, best first; fewer if the search did not find so many."""
        return self._finished[:count]

    def _by_score(self, candidates: Sequence[BeamCandidates]) -> Iterator[tuple[float, int, int]]:
        """(score, beam, place among its candidates) of all candidates that are not ruled out, best first."""
        runs = [
            [
                (beam.score + logprob, index, place)
                for place, logprob in enumerate(entry.logprobs)
                if logprob > -math.inf
            ]
            for index, (beam, entry) in enumerate(zip(self._beams, candidates, strict=True))
        ]
        return heapq.merge(*runs, key=lambda candidate: -candidate[0])

    def _finish(self, beam: int, candidates: BeamCandidates, place: int, score: float) -> None:
        token_id = candidates.token_ids[place]
        token_ids = [*self._beams[beam].token_ids, token_id]
        ended = token_id in self._enders or candidates.last
        self._finished.append(
            Hypothesis(
                token_ids=token_ids,
                cumulative_logprob=score,
                score=score / len(token_ids) ** self._length_penalty,
                finish_reason=FinishReason.STOP if ended else FinishReason.LENGTH,
                stop_reason=token_id if token_id in self._enders - self._eos_token_ids else None,
                logprobs=self._logprobs_with(beam, candidates, place),
            )
        )

    def _logprobs_with(self, beam: int, candidates: BeamCandidates, place: int) -> list[TokenLogprobs] | None:
        history = self._beams[beam].logprobs
        return None if history is None else [*history, candidates.reports[place]]

    def _is_over(self, best_live: float, length: int) -> bool:
        if len(self._finished) < self.width:
            return False
        if self._early_stopping is True:
            return True
        longest = self._early_stopping == "never" and self._length_penalty > 0
        reach = self._max_tokens if longest else length
        best_reachable: float = best_live / reach**self._length_penalty
        return best_reachable <= self._finished[-1].score
