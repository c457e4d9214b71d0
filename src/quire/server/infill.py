"""/infill: the text between a prefix and a suffix, as editors ask llama.cpp's server for it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from msgspec import UNSET, Struct, UnsetType

from quire.outputs import CompletionOutput
from quire.server.answers import Answer, Choice, Renderer, sse
from quire.server.completions import completion_generation
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import naming
from quire.server.fill_in import checked_marks, fill_in_prompt
from quire.server.generation import UsageCounter
from quire.server.limits import check_work
from quire.server.prompts import tokenize
from quire.server.protocol import CompletionRequest

MAX_EXTRA = 256
_NAMES = {"max_tokens": "n_predict", "repetition_penalty": "repeat_penalty", "prompt": "input_prefix"}


class ExtraFile(Struct):
    """A further file as context for the model."""

    text: str
    filename: str | None = None


class InfillRequest(Struct, kw_only=True):
    """Body of /infill."""

    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] | None = None
    prompt: str | None = None
    """Text behind the prefix."""
    model: str | None = None
    stream: bool | None = None
    n_predict: int | None = None
    """−1: as many tokens as the context holds, the default."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    repeat_penalty: float | None = None
    samplers: list[str] | None = None
    """Has no effect: filters have one order."""
    cache_prompt: bool | None = None
    """Has no effect: every prefix is cached."""
    n_indent: int | None = None
    t_max_prompt_ms: int | None = None
    t_max_predict_ms: int | None = None
    response_fields: list[str] | None = None


class Infilled(Struct, kw_only=True):
    """Reply of /infill, and each of its events."""

    content: str
    stop: bool
    model: str | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET
    tokens_predicted: int | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    stop_type: str | UnsetType = UNSET
    """eos, word or limit."""
    stopping_word: str | UnsetType = UNSET


@dataclass(slots=True)
class InfillRenderer(Renderer):
    """llama.cpp's objects."""

    model: str
    done: ClassVar[bytes] = b""
    keeps_samples: ClassVar[bool] = True

    def opening(self, choice: Choice, usage: UsageCounter) -> Sequence[bytes]:
        return ()

    def delta(self, choice: Choice, delta: CompletionOutput, usage: UsageCounter) -> bytes:
        return sse(Infilled(content=delta.text, stop=False))

    def ending(self, choices: Collection[Choice], usage: UsageCounter) -> Sequence[bytes]:
        last = self.whole(list(choices), usage)
        last.content = ""
        return (sse(last),)

    def whole(self, choices: Sequence[Choice], usage: UsageCounter) -> Infilled:
        sample, counts = choices[0].sample, usage.usage()
        word = sample.stop_reason if isinstance(sample.stop_reason, str) else ""
        return Infilled(
            content=sample.text,
            stop=True,
            model=self.model,
            tokens_evaluated=counts.prompt_tokens,
            tokens_predicted=counts.completion_tokens,
            tokens_cached=counts.prompt_tokens_details.cached_tokens,
            stop_type="limit" if sample.finish_reason == "length" else "word" if word else "eos",
            stopping_word=word,
        )


async def infill(context: RequestContext) -> None:
    request = await context.read(InfillRequest)
    context.check_generates()
    model = context.check_model(request.model)
    tokenizer = context.tokenizer()
    marks = checked_marks(tokenizer, "input_suffix")
    extra = [file.text for file in request.input_extra or ()][:MAX_EXTRA]
    texts = [*extra, request.input_prefix + (request.prompt or ""), request.input_suffix]
    check_work(texts, 1, context.settings, param="input_prefix")
    *files, prefix, suffix = await tokenize(tokenizer, texts, add_special_tokens=False)
    prompt = fill_in_prompt(tokenizer, marks, prefix, suffix, files)
    completion = CompletionRequest(
        prompt="",
        model=request.model,
        max_tokens=request.n_predict if (request.n_predict or -1) > 0 else None,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        seed=request.seed,
        stop=request.stop,
        stop_token_ids=marks.stop_token_ids,
        repetition_penalty=request.repeat_penalty,
    )
    with naming(_NAMES):
        generation = await completion_generation(context, completion, [prompt], clips_output=True)
    await Answer(generation.named(_NAMES), InfillRenderer(model)).send(context, stream=bool(request.stream))


ENDPOINTS = (
    Endpoint(
        "POST",
        "/infill",
        infill,
        "The text between a prefix and a suffix",
        InfillRequest,
        Infilled,
        streams=True,
        queues=True,
    ),
)
