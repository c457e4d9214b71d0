"""From a request's fields to SamplingParams: defaults, fields with two names, and fields that are not available."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import fields

from quire.errors import RequestError
from quire.sampling_params import MAX_EXTRA, SamplingParams
from quire.server.errors import Refusal, naming
from quire.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerateRequest,
    NotAvailable,
    TokenizeRequest,
)
from quire.structured_outputs import CompactJson, StructuredOutputsParams

_PASSED_ON = (
    "n",
    "beam_width",
    "length_penalty",
    "early_stopping",
    "best_of",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "logprobs_mode",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "truncate_prompt_tokens",
)
_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p")
_REFUSED = (
    *(field.name for field in fields(NotAvailable)),
    *("chat_template", "functions", "audio"),
)
_GUIDED = ("json", "regex", "choice", "grammar", "whitespace_pattern")
_WHY_REFUSED = {
    "chat_template": "templates come with the model; one in a request is refused",
    "functions": "functions are the old name of tools; send tools",
}


def completion_params(request: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams of a completion. A request for no tokens generates one, which is dropped later."""
    values = _values(request, defaults)
    values["logprobs"] = request.logprobs
    if request.max_tokens == 0:
        values.update(max_tokens=1, min_tokens=0)
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        values["prompt_logprobs"] = request.logprobs
    with naming({"extra": "vllm_xargs"}):
        return SamplingParams(**values)


def chat_params(request: ChatCompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams of a chat. Without a limit the answer may fill the context."""
    values = {"max_tokens": None, **_values(request, defaults)}
    if request.max_completion_tokens is not None:
        values["max_tokens"] = request.max_completion_tokens
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    with naming({"extra": "vllm_xargs", **sent_names(request)}):
        return SamplingParams(**values)


def sent_names(request: ChatCompletionRequest) -> dict[str, str]:
    """Names of `SamplingParams` → the fields in which a chat sent them, where these differ."""
    names = {"logprobs": "top_logprobs"} if request.logprobs else {}
    return names if request.max_completion_tokens is None else {**names, "max_tokens": "max_completion_tokens"}


def check_available(request: GenerateRequest | TokenizeRequest) -> None:
    """Raise `Refusal` for a field that asks for something Quire cannot do. The error names the field."""
    check_absent(request, _REFUSED)
    if not isinstance(request, GenerateRequest):
        return
    samples_more = request.best_of is not None and request.best_of > (request.n or 1) and not request.use_beam_search
    if request.stream and samples_more:
        raise RequestError(
            f"best_of is {request.best_of}, more than n {request.n or 1}: which samples are best is known when all "
            "have ended, so they cannot be streamed",
            param="best_of",
        )
    if request.structured_outputs is not None and request.structured_outputs.structural_tag:
        raise _refusal("structured_outputs", "structural_tag is not available; leave it out")
    _check_combination(request)
    if isinstance(request, ChatCompletionRequest) and set(request.modalities or ()) - {"text"}:
        raise _refusal("modalities", f"modalities are {', '.join(request.modalities or ())}; only text is available")


def check_absent(request: Struct, names: Iterable[str]) -> None:
    """Raise `Refusal` for the first of the fields `names` that is set to more than null, false or an empty value."""
    for name in names:
        if getattr(request, name, None):
            raise _refusal(name, _WHY_REFUSED.get(name, f"{name} is not available; leave it out"))


def _check_combination(request: GenerateRequest) -> None:
    """Raise `RequestError` for fields that have no meaning without another field."""
    if request.truncation_side not in (None, "left", "right"):
        raise RequestError(
            f"truncation_side is {request.truncation_side[:50]!r}; there is left and right", param="truncation_side"
        )
    if request.truncation_side is not None and request.truncate_prompt_tokens is None:
        raise RequestError("truncation_side needs truncate_prompt_tokens", param="truncation_side")
    if isinstance(request, CompletionRequest) and request.suffix and request.echo:
        raise RequestError("echo does not go with suffix: the answer lies between the two", param="echo")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")


def _values(request: GenerateRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in _PASSED_ON if getattr(request, name) is not None}
    if request.use_beam_search and request.beam_width is None:
        given["beam_width"] = given.pop("best_of", None) or request.n or 1  # vLLM's older requests say best_of
    if "beam_width" in given:
        # Beam search does not sample: drop the model's sampling defaults. Values that the client set are refused.
        defaults = {name: value for name, value in defaults.items() if name not in _SAMPLING_ONLY}
    if request.vllm_xargs:
        given["extra"] = request.vllm_xargs
        if len(request.vllm_xargs) <= MAX_EXTRA:  # more are refused: not each must become a text
            given["extra"] = {name: _as_text(value) for name, value in request.vllm_xargs.items()}
    if given.get("stop") == "":
        del given["stop"]
    return {**defaults, **given, "structured_outputs": structured_outputs(request)}


def structured_outputs(request: GenerateRequest) -> StructuredOutputsParams | None:
    """The constraint on the text, from any of three fields. Raises `RequestError` if several are set."""
    guided = {name: value for name in _GUIDED if (value := getattr(request, f"guided_{name}")) is not None}
    asked = [f"guided_{name}" for name in guided if name != "whitespace_pattern"]
    if request.structured_outputs is not None:
        asked.append("structured_outputs")
    wanted = request.response_format
    if wanted is not None and wanted.type != "text":
        asked.append("response_format")
    if not asked:
        return None
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} are set; set one of them", param=asked[-1])
    (asked_as,) = asked
    if request.structured_outputs is not None:
        given = {
            name: getattr(request.structured_outputs, name) for name in request.structured_outputs.__struct_fields__
        }
        given.pop("structural_tag")  # empty: others were refused
        given["json"] = _schema(given["json"])
        return StructuredOutputsParams(**{name: value for name, value in given.items() if value is not None})
    if wanted is None or wanted.type == "text":
        if "json" in guided:
            guided["json"] = _schema(guided["json"])
        return StructuredOutputsParams(**guided, asked_as=asked_as)
    if wanted.type == "json_object":
        if wanted.schema is not None:
            return StructuredOutputsParams(json=wanted.schema, asked_as=asked_as)
        return StructuredOutputsParams(json_object=True, asked_as=asked_as)
    if wanted.type != "json_schema":
        raise RequestError(
            f"response_format is of type {wanted.type!r}; there is text, json_object and json_schema",
            param="response_format",
        )
    if wanted.json_schema is None or wanted.json_schema.schema is None or not wanted.json_schema.name:
        raise RequestError(
            "response_format of type json_schema needs json_schema.name and json_schema.schema", param="response_format"
        )
    return StructuredOutputsParams(json=_schema(wanted.json_schema.schema), asked_as=asked_as)


def _schema(given: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """A schema that came as an object, as the compact text that stands for it: msgspec writes a large one ten times
    as fast as `json`, and the event loop waits for it."""
    return CompactJson(msgspec.json.encode(given).decode()) if isinstance(given, dict) else given


def _as_text(value: str | bool | int | float) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _refusal(name: str, message: str) -> Refusal:
    return Refusal(400, message, code="not_available", param=name)
