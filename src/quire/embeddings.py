"""What `LLM.embed`, `classify`, `score` and `rerank` return, by vLLM's names; made of RequestOutputs with vectors."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from quire.errors import RequestError
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams


@dataclass(slots=True)
class EmbeddingOutput:
    """One embedding."""

    embedding: list[float]
    """As many numbers as the model's hidden states have, or as its last Dense module or classification head makes."""

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


@dataclass(slots=True)
class ClassificationOutput:
    """The classes of one prompt."""

    probs: list[float]
    """The probability of each class, in the order of the model's labels."""

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(slots=True)
class ClassificationRequestOutput:
    """What `LLM.classify` returns for one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ClassificationOutput
    label: str = ""
    """The most likely class."""
    finished: bool = True


@dataclass(slots=True)
class ScoringOutput:
    """The score of one pair."""

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """What `LLM.score` returns for one pair."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput
    finished: bool = True


@dataclass(slots=True)
class RerankResult:
    """What `LLM.rerank` returns for one document."""

    index: int
    """Place of the document in the list that was given."""
    relevance_score: float
    document: str


def embedding_params(truncate_prompt_tokens: int | None = None) -> SamplingParams:
    """Parameters of a request of the task embed. Nothing is random, so that it takes no seed from other requests."""
    if truncate_prompt_tokens is None:
        return _WHOLE_TEXTS
    return SamplingParams(detokenize=False, seed=0, truncate_prompt_tokens=truncate_prompt_tokens)


_WHOLE_TEXTS = SamplingParams(detokenize=False, seed=0)


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


def shortened(vector: list[float], dimensions: int, allowed: Sequence[int] = ()) -> list[float]:
    """The first numbers of a vector, scaled to length 1. Raises the errors of `check_dimensions`."""
    check_dimensions(dimensions, len(vector), allowed)
    kept = vector[:dimensions]
    length = math.hypot(*kept)
    return [value / length for value in kept] if length else kept


def check_dimensions(dimensions: int, size: int, allowed: Sequence[int] = ()) -> None:
    """Raise `RequestError` for more numbers than the `size` of the vectors, and for a number that is not among those
    `allowed`, if there are any."""
    if not 1 <= dimensions <= size:
        raise RequestError(f"dimensions is {dimensions}; the model's vectors have {size} numbers", param="dimensions")
    if allowed and dimensions not in (*allowed, size):
        raise RequestError(
            f"dimensions is {dimensions}; the model was trained for {', '.join(map(str, allowed))}", param="dimensions"
        )
