"""PeerEngine: what a measured engine must be able to do, in one vocabulary for all. Standard library only."""

from collections.abc import Sequence
from typing import Protocol

from benchmarks.peers.workloads import WorkRequest

MAX_MODEL_LEN = 4096
"""Every engine is told to take sequences of this length."""
MAX_NUM_SEQS = 64
"""And to run so many at once."""


class NotOffered(Exception):
    """The engine has no such feature; its cell of the table stays empty."""


class PeerEngine(Protocol):
    """One engine with its model loaded. Both calls return the number of tokens of every sample, in order."""

    version: str

    def generate(self, requests: Sequence[WorkRequest], *, n: int, temperature: float) -> list[int]:
        """All requests at once, `n` samples of each; temperature 0 is greedy."""

    def beam_search(self, requests: Sequence[WorkRequest], *, beam_width: int) -> list[int]:
        """All requests at once, every beam kept. Raises `NotOffered`."""

    def forget(self, upcoming: Sequence[WorkRequest]) -> None:
        """Empty what was cached of earlier prompts, and get ready for these."""

    def close(self) -> None:
        """End processes of its own."""
