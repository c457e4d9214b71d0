"""SamplingState: what sampling remembers of one live sequence between two of its tokens."""

from collections.abc import Sequence
from copy import copy
from enum import Enum, auto

from quire.sampling.bad_words import BadWords
from quire.sampling.structured_output import GrammarState
from quire.sampling.token_counts import TokenCounts
from quire.sampling_params import SamplingParams

PLACEHOLDER_TOKEN = -1
"""Stands in `output_token_ids` for a token that the device has sampled but the host has not read yet.

It is not the placeholder of `StepPlan.token_ids`: there the scheduler writes `~row`, which says where on the device the
token lies. Here only the number of tokens matters, since it is the position of the next sample.
"""


class SamplingMode(Enum):
    """How a row of logits becomes a token. Rows of one mode are computed together."""

    GREEDY = auto()
    """The most likely token."""
    UNFILTERED = auto()
    """Any token, by its probability; `min_p` may rule some out."""
    TOP_K = auto()
    """One of the k most likely tokens; `top_p` may leave fewer."""
    TOP_P = auto()
    """One of the fewest most likely tokens that hold `top_p` of the probability."""
    BEAM = auto()
    """No token: the most likely ones are candidates of a beam search."""


class SamplingState:
    """One sequence's parameters and history, in the form the sampler reads. Its own methods are its only writers.

    A state built with the output so far equals one that got the output token by token, so preemption, fork and restart
    change no token. Token ids outside the vocabulary are ignored: the engine refuses requests that name them.
    """

    __slots__ = (
        "allowed_ids",
        "bad_words",
        "bias_by_id",
        "ending_ids",
        "grammar",
        "mode",
        "num_candidates",
        "output_token_ids",
        "params",
        "prompt_token_ids",
        "sample_index",
        "seed",
        "token_counts",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        seed: int,
        sample_index: int,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> None:
        self.params = params
        self.prompt_token_ids = prompt_token_ids
        self.output_token_ids = list(output_token_ids)
        """Tokens generated so far. Their number is the position of the next sample; logits processors may read them.
        The list stays the same object as long as the state lives."""
        self.grammar = grammar
        """Where the sequence is in its grammar. The grammar has consumed `output_token_ids` already."""
        self.seed = seed
        self.sample_index = sample_index
        self.mode = _choose_mode(params, vocab_size)
        self.num_candidates = 0
        """Candidates of a beam: enough for all beams to go on even if every ending token is among them. 0: no beam."""
        if params.beam_width is not None:
            self.num_candidates = min(vocab_size, params.beam_width + len(stop_token_ids))
        self.allowed_ids: list[int] | None = None
        if params.allowed_token_ids is not None:
            self.allowed_ids = [id for id in params.allowed_token_ids if 0 <= id < vocab_size]
        self.ending_ids: list[int] = []
        if self.position < params.min_tokens:
            self.ending_ids = [id for id in stop_token_ids if 0 <= id < vocab_size]
        self.bias_by_id: dict[int, float] = {}
        if params.logit_bias:
            self.bias_by_id = {id: bias for id, bias in params.logit_bias.items() if 0 <= id < vocab_size}
        self.bad_words: BadWords | None = None
        if params.bad_words_token_ids:
            self.bad_words = BadWords(params.bad_words_token_ids, vocab_size)
        self.token_counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0:
            self.token_counts = TokenCounts(prompt_token_ids, vocab_size)
        elif params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self.token_counts = TokenCounts((), vocab_size)
        for token_id in output_token_ids if self.bad_words or self.token_counts else ():
            self._count(token_id)

    @property
    def is_stateless(self) -> bool:
        """True if `append` does nothing but append to `output_token_ids`."""
        return self.grammar is None and self.bad_words is None and self.token_counts is None

    @property
    def position(self) -> int:
        """Number of tokens generated so far."""
        return len(self.output_token_ids)

    def fork(self) -> "SamplingState":
        """An independent copy."""
        child = copy(self)
        child.output_token_ids = self.output_token_ids.copy()
        if self.bad_words is not None:
            child.bad_words = self.bad_words.fork()
        if self.token_counts is not None:
            child.token_counts = self.token_counts.fork()
        if self.grammar is not None:
            child.grammar = self.grammar.fork()
        return child

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.output_token_ids.append(token_id)
        self._count(token_id)
        if self.grammar is not None:
            self.grammar.append(token_id)

    def append_placeholder(self) -> int:
        """Add a token whose id is not known yet. Returns its index for `fill_placeholder`. Only for states whose next
        sample does not depend on the token itself (`is_stateless`)."""
        self.output_token_ids.append(PLACEHOLDER_TOKEN)
        return len(self.output_token_ids) - 1

    def fill_placeholder(self, index: int, token_id: int) -> None:
        """Put the token's id where `append_placeholder` left room for it."""
        self.output_token_ids[index] = token_id

    def append_forced(self, limit: int) -> list[int]:
        """Add the tokens that the grammar forces, at most `limit` of them, and return them."""
        forced = self.grammar.take_forced(limit) if self.grammar is not None else []
        self.output_token_ids += forced
        for token_id in forced:
            self._count(token_id)
        return forced

    def banned_ids(self) -> list[int]:
        """Tokens that `min_tokens` and the bad words rule out at this position. A token may be listed twice."""
        banned = self.bad_words.completions() if self.bad_words else []
        # A text whose grammar is complete must end, however short it is.
        if self.position < self.params.min_tokens and not (self.grammar and self.grammar.complete):
            banned += self.ending_ids
        return banned

    def _count(self, token_id: int) -> None:
        if self.bad_words is not None:
            self.bad_words.append(token_id)
        if self.token_counts is not None:
            self.token_counts.append(token_id)


def _choose_mode(params: SamplingParams, vocab_size: int) -> SamplingMode:
    if params.beam_width is not None:
        return SamplingMode.BEAM
    if params.greedy:
        return SamplingMode.GREEDY
    if 0 < params.top_k < vocab_size:
        return SamplingMode.TOP_K
    return SamplingMode.TOP_P if params.top_p < 1.0 else SamplingMode.UNFILTERED
