"""The table of proposers: what `method` of the speculative config stands for.

Another way to draft is a class in a file of its own, and a row here and in the config. A proposer with a model drafts
in the runner: its drafts come back in the `StepResult`, and its row here hands them out for the next step.
"""

from collections.abc import Callable
from typing import Protocol

from quire.scheduler.acceptance import Draft
from quire.scheduler.ngram_lookup import NgramProposer
from quire.speculative_config import SpeculativeConfig


class Proposer(Protocol):
    """Drafts for one sequence. Drafts change the number of steps and never a token, so any guess is allowed."""

    def propose(self, token_ids: list[int], max_tokens: int) -> Draft:
        """Up to `max_tokens` ≥ 1 tokens that may follow `token_ids`, the sequence's tokens so far.

        The list is the same object in every call, and only grows.
        """
        ...


PROPOSERS: dict[str, Callable[[SpeculativeConfig], Proposer]] = {
    "ngram": lambda config: NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max),
}
