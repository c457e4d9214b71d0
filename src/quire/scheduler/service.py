"""Service: the worth of computed tokens in one unit, for policies that order requests or share between tenants by it.

The weights are those of VTC (Sheng et al., OSDI 2024): an output token is worth two prompt tokens.
"""

from typing import Protocol

PROMPT_TOKEN = 1.0
OUTPUT_TOKEN = 2.0


class Progress(Protocol):
    """What the engine has computed since its start. Policies read these counts and never write them."""

    @property
    def total_steps(self) -> int: ...
    @property
    def total_prompt_tokens(self) -> int: ...
    @property
    def total_generated_tokens(self) -> int: ...


def total_service(progress: Progress) -> float:
    """The service that all requests were given together."""
    return PROMPT_TOKEN * progress.total_prompt_tokens + OUTPUT_TOKEN * progress.total_generated_tokens
