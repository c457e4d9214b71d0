"""PeerEngine: the interface of a measured engine. Standard library only."""

from collections.abc import Sequence
from typing import Protocol

from benchmarks.peers.workloads import WorkRequest

MAX_MODEL_LEN = 4096
"""Maximum sequence length of every engine."""
MAX_NUM_SEQS = 64
"""Maximum sequences at once of every engine."""


class NotOffered(Exception):
    """The engine lacks the feature; its cell of the table stays empty."""


class PeerEngine(Protocol):
    """One engine with its model loaded. Both calls return the number of tokens of every sample, in order."""

    version: str

    def generate(self, requests: Sequence[WorkRequest], *, n: int, temperature: float) -> list[int]:
        """Run all requests at once with `n` samples each; temperature 0 is greedy."""

    def beam_search(self, requests: Sequence[WorkRequest], *, beam_width: int) -> list[int]:
        """Run all requests at once with beam search and keep every beam. Raises `NotOffered`."""

    def reset(self, upcoming: Sequence[WorkRequest]) -> None:
        """Clear the prefix cache and get ready for these requests."""

    def close(self) -> None:
        """End the engine's own processes."""
