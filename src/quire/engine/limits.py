"""The engine's door: what a request may refer to, checked where the model is known, whoever sent it."""

from collections.abc import Iterable

from quire.errors import RequestError
from quire.request import Request


def check_request(request: Request, *, vocab_size: int, max_logprobs: int) -> None:
    """Raise `RequestError` for tokens outside the vocabulary and for more log-probabilities than allowed."""
    params = request.params
    _check_tokens("prompt", request.prompt_token_ids, vocab_size)
    for output in request.output_token_ids.values():
        _check_tokens("output_token_ids", output, vocab_size)
    _check_tokens("stop_token_ids", params.stop_token_ids, vocab_size)
    _check_tokens("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_tokens("logit_bias", params.logit_bias or (), vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and (value if value >= 0 else vocab_size) > max_logprobs:
            raise RequestError(
                f"{name} is {value}; this engine gives at most {max_logprobs} (max_logprobs)", param=name
            )


def _check_tokens(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} holds token {token_id}; the model's vocabulary ends at {vocab_size - 1}", param=param
            )
