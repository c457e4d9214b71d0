"""AcceptanceModel: how likely the tokens of a draft are to be accepted, by how the last drafts fared.

A draft is judged by the tokens that came after it, whether it was computed or not. So judging costs nothing, and the
model can start low.
"""

from collections.abc import Sequence
from typing import NamedTuple

_DECAY = 0.98
"""Weight that older drafts keep with each new one."""
_PRIOR = 3.0
"""Weight of the prior, in judged tokens."""
_DOUBT = 1.0
"""Drafted tokens that count as rejected before any was judged. It decays like everything that was judged."""


class Draft(NamedTuple):
    """Tokens that a proposer expects next."""

    token_ids: list[int]
    """May be empty."""
    kind: int = 0
    """Drafts of one kind are about equally good. Each kind has its own acceptance model."""


class AcceptanceModel:
    """The probability that a drafted token is accepted if the tokens before it in the draft are."""

    __slots__ = ("_accepted", "_rejected", "_shared")

    def __init__(self, shared: "AcceptanceModel | None" = None) -> None:
        """A sequence's model starts from `shared`, the model of all sequences, and also updates it."""
        self._accepted, self._rejected = 0.0, _DOUBT
        self._shared = shared

    @property
    def probability(self) -> float:
        """Below 1, and low while little is known."""
        prior = 0.0 if self._shared is None else self._shared.probability
        return (self._accepted + _PRIOR * prior) / (self._accepted + self._rejected + _PRIOR)

    def judge(self, draft: Sequence[int], came: Sequence[int]) -> None:
        """Learn from a draft and the tokens that came instead, at least one."""
        num_accepted = num_equal(draft, came)
        self._accepted = _DECAY * self._accepted + num_accepted
        self._rejected = _DECAY * self._rejected + (num_accepted < min(len(draft), len(came)))
        if self._shared is not None:
            self._shared.judge(draft, came)


def num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
