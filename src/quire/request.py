"""Request: what was asked, complete and immutable, as it travels from a client's call to the scheduler.

What becomes of it (sequences, block tables, progress) belongs to `quire.scheduler.sequence`.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from quire.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sample ended, in OpenAI's words plus abort and error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it. All values are resolved: no default is looked up later."""

    request_id: str
    """Made by the engine's front, never by a client, so that two clients cannot collide."""
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int = 0
    """The params' seed, or one drawn from the engine's."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sample; empty where `ignore_eos` is set."""
    max_tokens: int = 16
    """The params' limit, or all that the context has room for."""
    arrival_time: float = 0.0
    """Seconds on the engine's monotonic clock."""
    priority: int = 0
    """Lower runs first, as in vLLM."""
    cache_salt: str = ""
    """Only requests of the same salt share prefix blocks."""
    tenant: str = ""
    """On whose account: the client's API key, or its name for a user. Shares are fair between tenants."""
    workload: str = ""
    """What it is sent for: route and system prompt. Requests of one tenant and workload have answers of like lengths.
    """
    num_returned: int = 0
    """Of the params' n samples, return so many of highest cumulative log-probability, at the end; 0: all, as they come.
    """
    grammar_bytes: int = 0
    """What the grammar of `structured_outputs` takes once compiled, as measured when it was checked."""
    hides_logprobs: bool = False
    """The samples' log-probabilities are asked for to rank them, not by the client."""
    output_token_ids: dict[int, list[int]] = field(default_factory=dict)
    """Samples to go on with after an earlier engine process ended: index → its tokens so far. Empty: n new samples."""
