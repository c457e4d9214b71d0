"""Admission check: refuses a request that the model cannot serve. The front and the core run the same functions."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

from quire.config import EngineConfig
from quire.errors import ConfigError, RequestError
from quire.request import Request, SampleProgress, Task

NOTHING_YET: Mapping[int, SampleProgress] = MappingProxyType({})
"""The progress of a request that no other engine began."""


def check_request(
    request: Request, *, vocab_size: int, max_logprobs: int, max_model_len: int, knows_prompt: bool = False
) -> None:
    """Raise `RequestError` for a prompt without room in the context, for tokens outside the vocabulary, and for more
    log-probabilities than allowed. With `knows_prompt` the prompt's tokens are known to be in the vocabulary."""
    params = request.params
    num_output = 0 if request.task is Task.EMBED else 1
    check_prompt_length(len(request.prompt_token_ids), max_model_len, num_output=num_output)
    if not knows_prompt:
        _check_tokens("prompt", request.prompt_token_ids, vocab_size)
    for output in request.output_token_ids.values():
        _check_tokens("output_token_ids", output, vocab_size)
    _check_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_tokens("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_tokens("logit_bias", params.logit_bias or (), vocab_size)
    for word in params.bad_words_token_ids:
        _check_tokens("bad_words_token_ids", word, vocab_size)
    _check_allowed(request)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and (value if value >= 0 else vocab_size) > max_logprobs:
            raise RequestError(
                f"{name} is {value}; this engine gives at most {max_logprobs} (max_logprobs)", param=name
            )


def resumed(request: Request, progress: Mapping[int, SampleProgress], *, vocab_size: int) -> Request:
    """The request with the tokens of its samples that another engine began. Raises `RequestError` for progress that
    no engine can have made."""
    n = request.params.n
    if request.task is Task.EMBED or request.num_returned or request.params.beam_width is not None:
        raise RequestError(
            "only samples can be resumed, not embeddings, beams or the best of several", param="progress"
        )
    for index, sample in progress.items():
        num_tokens = len(sample.token_ids)
        if not 0 <= index < n:
            raise RequestError(f"progress has sample {index}; the request has {n}", param="progress")
        if num_tokens + (sample.finish_reason is None) > request.max_tokens:
            raise RequestError(
                f"progress has {num_tokens} tokens of a sample; max_tokens is {request.max_tokens}", param="progress"
            )
        _check_tokens("progress", sample.token_ids, vocab_size)
    nothing = SampleProgress([])
    samples = {index: progress.get(index, nothing) for index in range(n)}
    live = {index: list(ids) for index, (ids, reason) in samples.items() if reason is None}
    return replace(request, output_token_ids=live)


def check_prompt_length(
    num_tokens: int, max_model_len: int, *, name: str = "the prompt", param: str = "prompt", num_output: int = 1
) -> None:
    """Raise `RequestError` for an empty prompt, and for one that leaves no room for `num_output` output tokens."""
    if not num_tokens:
        raise RequestError(f"{name} is empty: it must hold at least one token", param=param)
    if num_tokens + num_output > max_model_len:
        raise RequestError(
            # Clients look for "maximum context length is N tokens" and "prompt is too long", to shorten and retry.
            f"{name} has {num_tokens} tokens, but this model's maximum context length is {max_model_len} tokens"
            f"{', output included' if num_output else ''}: the prompt is too long; "
            "shorten it or set truncate_prompt_tokens",
            param=param,
            code="context_length_exceeded",
        )


def _check_allowed(request: Request) -> None:
    """Raise `RequestError` if other parameters forbid every token of `allowed_token_ids` from the start."""
    params = request.params
    if params.allowed_token_ids is None:
        return
    allowed = set(params.allowed_token_ids)
    forbidden = {"bad_words": {word[0] for word in params.bad_words_token_ids if len(word) == 1}}
    if params.min_tokens:
        forbidden["min_tokens"] = {*request.eos_token_ids, *params.stop_token_ids}
    names = [name for name, tokens in forbidden.items() if tokens & allowed]
    if allowed <= set().union(*forbidden.values()):
        raise RequestError(
            f"allowed_token_ids leaves no token to sample: all are forbidden by {' and '.join(names)}; allow more "
            f"tokens, or leave out {' or '.join(names)}",
            param="allowed_token_ids",
            code="contradictory_parameters",
        )


def _check_tokens(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):  # fast, also for long prompts
        return
    wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise RequestError(f"{param} holds token {wrong}; the model's vocabulary ends at {vocab_size - 1}", param=param)


def check_one_engine(config: EngineConfig) -> None:
    """Raise `ConfigError` if a config asks for several engines where one is made."""
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size is {config.data_parallel_size}, but several engines only run behind `quire serve`; "
            "leave it out"
        )
