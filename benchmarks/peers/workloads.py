"""The workloads: token-id prompts with exact output lengths, always the same from one seed.

Standard library only: every engine's own interpreter imports it. The order of the definitions matters: they share one
random generator.
"""

import math
import random
from dataclasses import dataclass

SEED = 20240607
TOKEN_IDS = range(3, 32000)
"""Token ids that are valid in every benchmark model and not special."""


@dataclass(frozen=True)
class WorkRequest:
    """A prompt and the output length of its samples."""

    prompt_token_ids: list[int]
    num_output_tokens: int
    adapter: tuple[str, int, str] | None = None
    """Name, number and folder of the LoRA adapter that answers."""


@dataclass(frozen=True)
class Workload:
    """Requests that an engine gets all at once."""

    title: str
    requests: list[WorkRequest]
    n: int = 1
    temperature: float = 0.0
    beam_width: int | None = None
    """Number of beams, all of which are kept."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return (self.beam_width or self.n) * sum(request.num_output_tokens for request in self.requests)


def make_workloads() -> dict[str, Workload]:
    """Every workload by its short name."""
    rng = random.Random(SEED)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(TOKEN_IDS.start, TOKEN_IDS.stop) for _ in range(count)]

    def length(mean: float, sigma: float, low: int, high: int) -> int:
        """A log-normal length, like those of conversations, with the given mean before clipping."""
        return min(max(round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)), low), high)

    def request(num_prompt_tokens: int, num_output_tokens: int) -> WorkRequest:
        return WorkRequest(tokens(num_prompt_tokens), num_output_tokens)

    mixed = [WorkRequest(tokens(length(160, 0.7, 16, 512)), length(128, 0.6, 16, 256)) for _ in range(64)]
    prefix = tokens(512)
    return {
        "W1": Workload("offline throughput, mixed lengths", mixed),
        "W2": Workload("shared 512-token prefix", [WorkRequest(prefix + tokens(32), 32) for _ in range(64)]),
        "W3": Workload("parallel sampling, n=8", [request(256, 64) for _ in range(8)], n=8, temperature=1.0),
        "W4": Workload("beam search, width 4", [request(128, 64) for _ in range(8)], beam_width=4),
        "W5": Workload("single stream, 128 + 128 tokens", [request(128, 128)]),
        "W6": Workload("prefill of 2,048 tokens", [request(2048, 1)]),
        "warm": Workload("warm-up", [request(64, 16) for _ in range(8)]),
    }
