"""SamplingState: what sampling remembers of one live sequence between two of its tokens."""

from collections.abc import Sequence
from copy import copy
from enum import Enum

from quire.sampling.bad_words import BadWords
from quire.sampling.structured_output import GrammarState
from quire.sampling.token_counts import TokenCounts
from quire.sampling_params import SamplingParams

UNKNOWN_TOKEN = -1


class Draw(Enum):
    """The ways to get from a row of logits to a token; rows of one way are computed together."""

    GREEDY = "the most likely token"
    UNFILTERED = "any token, by its probability"
    TOP_K = "one of the k most likely, of which top_p may leave fewer"
    TOP_P = "one of the fewest most likely that hold enough probability"
    BEAM = "none: the most likely ones are candidates of a beam search"


class SamplingState:
    """One sequence's parameters and history, in the form the sampler reads; `append` is its only writer.

    A state built with the output so far equals one that was fed it token by token, so preemption, fork and restart
    cannot be seen in the tokens. Token ids outside the vocabulary are ignored: the engine refuses them where a client
    names them.
    """

    __slots__ = (
        "allowed_ids",
        "bad_words",
        "bias_by_id",
        "draw",
        "ending_ids",
        "grammar",
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
        """Generated so far: a draw depends on how many, logits processors may read them. Eight bytes a token."""
        self.grammar = grammar
        """Where the sequence is in the grammar it follows; it has consumed `output_token_ids` already."""
        self.seed = seed
        self.sample_index = sample_index
        self.draw = _choose_draw(params, vocab_size)
        self.num_candidates = 0
        """Of a beam: so many that a full set of beams can go on, however many of them end a sequence."""
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
            self._remember(token_id)

    @property
    def is_stateless(self) -> bool:
        """Whether `append` does no more than append to `output_token_ids`."""
        return self.grammar is None and self.bad_words is None and self.token_counts is None

    @property
    def position(self) -> int:
        """Number of tokens generated so far."""
        return len(self.output_token_ids)

    def fork(self) -> "SamplingState":
        """An equal state that goes its own way."""
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
        """Follow a token that the sequence generated."""
        self.output_token_ids.append(token_id)
        self._remember(token_id)
        if self.grammar is not None:
            self.grammar.append(token_id)

    def promise(self) -> int:
        """Follow a token that is drawn but not known yet; returns where `keep` puts it. For sequences that need not
        know their tokens to draw the next."""
        self.output_token_ids.append(UNKNOWN_TOKEN)
        return len(self.output_token_ids) - 1

    def keep(self, place: int, token_id: int) -> None:
        """The token that was promised."""
        self.output_token_ids[place] = token_id

    def take_forced(self, limit: int) -> list[int]:
        """Follow the tokens that the grammar forces, at most `limit` of them."""
        forced = self.grammar.take_forced(limit) if self.grammar is not None else []
        self.output_token_ids += forced
        for token_id in forced:
            self._remember(token_id)
        return forced

    def banned_ids(self) -> list[int]:
        """Tokens that `min_tokens` and the bad words rule out at this position; a token may be named twice."""
        banned = self.bad_words.completions() if self.bad_words else []
        # A text that is whole ends, however short it is.
        if self.position < self.params.min_tokens and not (self.grammar and self.grammar.complete):
            banned += self.ending_ids
        return banned

    def _remember(self, token_id: int) -> None:
        if self.bad_words is not None:
            self.bad_words.append(token_id)
        if self.token_counts is not None:
            self.token_counts.append(token_id)


def _choose_draw(params: SamplingParams, vocab_size: int) -> Draw:
    if params.beam_width is not None:
        return Draw.BEAM
    if params.greedy:
        return Draw.GREEDY
    if 0 < params.top_k < vocab_size:
        return Draw.TOP_K
    return Draw.TOP_P if params.top_p < 1.0 else Draw.UNFILTERED
