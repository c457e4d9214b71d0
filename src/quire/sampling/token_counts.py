"""TokenCounts: a sequence's distinct tokens, and how often it generated each. The penalties are computed from it."""

from array import array
from collections.abc import Iterable
from copy import copy


class TokenCounts:
    """Sparse, with one entry per distinct token: a thousand sequences must not hold a vocabulary each.

    `ids` and `num_generated` are parallel and only grow. They are arrays, so NumPy reads them without a copy.
    """

    __slots__ = ("_slots", "_vocab_size", "ids", "num_generated")

    def __init__(self, prompt_token_ids: Iterable[int], vocab_size: int) -> None:
        distinct = dict.fromkeys(prompt_token_ids)
        self.ids = array("q", [token_id for token_id in distinct if 0 <= token_id < vocab_size])
        self.num_generated = array("f", bytes(4 * len(self.ids)))
        self._slots = {token_id: slot for slot, token_id in enumerate(self.ids)}
        self._vocab_size = vocab_size

    def fork(self) -> "TokenCounts":
        """An independent copy."""
        child = copy(self)
        child.ids, child.num_generated, child._slots = self.ids[:], self.num_generated[:], self._slots.copy()
        return child

    def append(self, token_id: int) -> None:
        """Count a generated token."""
        slot = self._slots.get(token_id)
        if slot is not None:
            self.num_generated[slot] += 1
        elif 0 <= token_id < self._vocab_size:
            self._slots[token_id] = len(self.ids)
            self.ids.append(token_id)
            self.num_generated.append(1)
