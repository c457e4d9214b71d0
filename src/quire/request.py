"""Request: what was asked, complete and immutable, as it travels from a client's call to the scheduler.

Its sequences, block tables and progress belong to `quire.scheduler.sequence`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from quire.errors import RequestError
from quire.image_input import ImagePixels
from quire.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sample ended, in OpenAI's words plus abort and error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


BACKGROUND = 2**31 - 1
"""The priority of requests that only use what all others leave: they give back their memory while a request of another
priority waits for its first token."""


TASKS = ("auto", "generate", "embed", "classify", "score")
"""What a model may be for."""
POOLINGS = ("mean", "cls", "last", "max", "mean_sqrt_len", "weighted_mean")
"""How hidden states become one vector, over a text's n tokens: mean, first, last, maximum, sum / √n, and the mean
weighted by 1 to n."""


class Task(StrEnum):
    """What a request asks of its prompt."""

    SAMPLE = "sample"
    """Tokens that continue it."""
    EMBED = "embed"
    """A vector that stands for it; nothing is sampled."""


class InputSpan(NamedTuple):
    """Tokens of a prompt that stand for an input that is not text, such as an image."""

    content_hash: bytes
    """A collision-resistant hash of the input and of everything that decides its embeddings."""
    offset: int
    """Index of its first token in the prompt."""
    length: int
    """Number of its tokens."""


class SampleProgress(NamedTuple):
    """What a client already has of a sample that another server began."""

    token_ids: list[int]
    finish_reason: str | None = None
    """Why it ended; None if it goes on."""


@dataclass(frozen=True, slots=True)
class BegunPrompt:
    """A prompt whose samples another engine began."""

    token_ids: list[int]
    progress: Mapping[int, SampleProgress]
    """By sample; samples that are missing have no tokens yet."""


class PrefilledPrompt(list[int]):
    """A prompt that another engine has just computed: its blocks can be fetched from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what to make of it. All values are final: no default is looked up later."""

    request_id: str
    """Made by the engine's front, never by a client, so that two clients cannot collide."""
    prompt_token_ids: list[int]
    params: SamplingParams
    task: Task = Task.SAMPLE
    seed: int = 0
    """The params' seed, or one derived from the engine's."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sample; empty if `ignore_eos` is set."""
    max_tokens: int = 16
    """The params' limit, or all that fits into the context; 0 for the task embed."""
    arrival_time: float = 0.0
    """Seconds on the engine's monotonic clock."""
    priority: int = 0
    """Lower runs first, as in vLLM."""
    cache_salt: str = ""
    """Only requests with the same salt share prefix blocks."""
    adapter: str = ""
    """Hash of the LoRA adapter's content; empty for the model alone. Only requests of the same adapter share blocks."""
    adapter_path: str = ""
    """The adapter's folder."""
    second_text: int = 0
    """Index of the first token of a pair's second text, for models that mark it; 0: there is none."""
    inputs: tuple[InputSpan, ...] = ()
    """What is not text in the prompt, in its order and without overlap."""
    pixels: tuple[ImagePixels, ...] = ()
    """The pixels of each of the inputs."""
    tenant: str = ""
    """The account: the client's API key, or its name for a user. Shares are fair between tenants."""
    workload: str = ""
    """The purpose: route and system prompt. Requests of one tenant and workload have answers of similar length."""
    prefilled: bool = False
    """Another engine has just computed the prompt; see `PrefilledPrompt`."""
    num_returned: int = 0
    """Return only so many of the params' n samples, those of highest cumulative log-probability, at the end. 0: return
    all, as they come."""
    grammar_bytes: int = 0
    """Memory of the compiled grammar of `structured_outputs`, measured when it was checked."""
    hides_logprobs: bool = False
    """Log-probabilities are computed to rank the samples; the client did not ask for them."""
    output_token_ids: dict[int, list[int]] = field(default_factory=dict)
    """Samples to resume after an earlier engine process ended: index → its tokens so far. Empty: n new samples."""

    def __post_init__(self) -> None:
        """Raises `RequestError` for inputs that do not lie in the prompt one after the other, and for what only the
        task sample can have."""
        if self.task is Task.EMBED:
            self._check_embed()
        end, num_tokens = 0, len(self.prompt_token_ids)
        for content_hash, offset, length in self.inputs:
            if not content_hash or length < 1 or offset < end or offset + length > num_tokens:
                raise RequestError(
                    f"an input of {length} tokens with a hash of {len(content_hash)} bytes starts at token {offset}, "
                    f"where the one before it ends at {end} and the prompt at {num_tokens}; inputs have a hash, at "
                    "least one token, and do not overlap",
                    param="prompt",
                )
            end = offset + length
        if len(self.pixels) not in (0, len(self.inputs)):
            raise RequestError(
                f"{len(self.inputs)} inputs came with the pixels of {len(self.pixels)}", param="multi_modal_data"
            )

    @property
    def num_pixel_bytes(self) -> int:
        """Memory of its images."""
        return sum(pixels.num_bytes for pixels in self.pixels)

    def _check_embed(self) -> None:
        """Raise `RequestError` for parameters that sample, or that report on tokens."""
        if self.params.num_samples != 1:
            raise RequestError(
                f"n is {self.params.num_samples}; an embedding is one vector of its prompt, so n must be 1", param="n"
            )
        if self.max_tokens:
            raise RequestError(
                f"max_tokens is {self.max_tokens}; an embedding samples no tokens, so it must be 0", param="max_tokens"
            )
        for name in ("beam_width", "structured_outputs", "logprobs", "prompt_logprobs"):
            if getattr(self.params, name) is not None:
                raise RequestError(f"{name} is set; an embedding has no output tokens: leave it out", param=name)
