"""EmbeddingRequestOutput: what `LLM.embed` returns, by vLLM's names; made from a RequestOutput that holds a vector."""

import math
from array import array
from dataclasses import dataclass
from operator import mul

from quire.errors import RequestError
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams


@dataclass(slots=True)
class EmbeddingOutput:
    """One embedding."""

    embedding: list[float]
    """As many numbers as the model's hidden states have."""

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""


def embedding_params(truncate_prompt_tokens: int | None = None) -> SamplingParams:
    """Parameters of a request of the task embed. Nothing is random, so that it takes no seed from other requests."""
    return SamplingParams(detokenize=False, seed=0, truncate_prompt_tokens=truncate_prompt_tokens)


def make_embedding(output: RequestOutput, *, normalize: bool) -> EmbeddingRequestOutput:
    """The embedding in a finished output of the task embed; with `normalize`, scaled to length 1.

    Raises `RequestError` if the request failed.
    """
    if output.vector is None:
        raise RequestError(next(sample.error or "" for sample in output.outputs), param="prompt")
    values = array("f", output.vector).tolist()
    length = math.sqrt(sum(map(mul, values, values))) if normalize else 1.0
    embedding = [value / length for value in values] if length > 0 and length != 1.0 else values
    return EmbeddingRequestOutput(
        output.request_id,
        output.prompt_token_ids,
        EmbeddingOutput(embedding),
        num_cached_tokens=output.num_cached_tokens,
    )
