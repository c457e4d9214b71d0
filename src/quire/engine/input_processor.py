"""InputProcessor: turns a prompt and its parameters, as a user gives them, into a Request with every value resolved."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec

from quire.engine.image_prompt import ImagePrompt, no_truncation
from quire.engine.limits import check_request
from quire.engine.model_task import check_task
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.lora.registry import Adapter
from quire.model_config import ModelConfig
from quire.request import PrefilledPrompt, Request, Task
from quire.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's {"prompt": text} and {"prompt_token_ids": ids}."""


class RequestOptions(TypedDict, total=False):
    """What a request has besides its prompt and parameters; see `Request`."""

    priority: int
    cache_salt: str
    tenant: str
    workload: str
    adapter: Adapter | None


class _Tokens(NamedTuple):
    """A prompt's tokens."""

    text: str | None
    """The prompt, if it was given as text."""
    token_ids: list[int]
    second_text: int = 0
    """Index of a pair's second text; 0: there is none."""
    is_known: bool = False
    """All tokens were found in the vocabulary."""


class InputProcessor:
    """Tokenises, truncates, fills in defaults and checks. Without a `tokenizer` prompts must be token ids."""

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        max_logprobs: int,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model_config = model_config
        self._vocab_size = model_config.vocab_size
        self._known_ids: Any = list[Annotated[int, msgspec.Meta(ge=0, lt=model_config.vocab_size)]]
        self._eos_token_ids = model_config.eos_token_ids
        if not self._eos_token_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
            self._eos_token_ids = (tokenizer.eos_token_id,)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_logprobs = max_logprobs
        self._seeds = random.Random(seed)
        self._clock = clock

    def make_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        task: Task = Task.SAMPLE,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        workload: str = "",
        adapter: Adapter | None = None,
    ) -> tuple[Request, str | None]:
        """The request, and the prompt if it was given as text. Raises `RequestError`."""
        check_task(self._model_config, task)
        text, token_ids, second_text, is_known = self._tokens_of(prompt)
        inputs, pixels = (prompt.inputs, prompt.pixels) if isinstance(prompt, ImagePrompt) else ((), ())
        if params.truncate_prompt_tokens is not None:
            if inputs:
                raise no_truncation()
            num_output = 0 if task is Task.EMBED else params.max_tokens or 1
            token_ids = self._truncated(token_ids, params.truncate_prompt_tokens, self._max_model_len - num_output)
        if params.bad_words and not params.bad_words_token_ids:
            params = params.with_changes(bad_words_token_ids=self.bad_word_ids(params.bad_words))
        num_returned, hides_logprobs = 0, False
        if params.num_samples > params.n:
            num_returned, hides_logprobs = params.n, params.logprobs is None
            params = params.with_changes(
                n=params.num_samples, best_of=None, logprobs=0 if hides_logprobs else params.logprobs
            )
        max_tokens = 0
        if task is Task.SAMPLE:
            max_tokens = params.max_tokens or max(1, self._max_model_len - len(token_ids))
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            task=task,
            second_text=second_text,
            seed=(params.seed if params.seed is not None else self._seeds.getrandbits(64)) % 2**64,
            eos_token_ids=() if params.ignore_eos else self._eos_token_ids,
            max_tokens=max_tokens,
            arrival_time=self._clock(),
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            workload=workload,
            inputs=inputs,
            pixels=pixels,
            adapter=adapter.digest if adapter is not None else "",
            adapter_path=adapter.path if adapter is not None else "",
            prefilled=isinstance(prompt, PrefilledPrompt),
            num_returned=num_returned,
            hides_logprobs=hides_logprobs,
        )
        check_request(
            request,
            vocab_size=self._vocab_size,
            max_logprobs=self._max_logprobs,
            max_model_len=self._max_model_len,
            knows_prompt=is_known or self._known(token_ids) is not None,
        )
        return request, text

    def _known(self, token_ids: list[int]) -> list[int] | None:
        """A copy, if all are integers of the vocabulary: a quarter of the time of min and max. None if this cannot say
        so, as with numpy's integers."""
        try:
            copy: list[int] = msgspec.convert(token_ids, self._known_ids)
        except msgspec.ValidationError:
            return None
        return copy

    def _truncated(self, token_ids: list[int], keep: int, room: int) -> list[int]:
        """The last tokens, or what an encoder reads; −1: as many as there is room for."""
        keep = keep if keep > 0 else max(1, room)
        if self._model_config.pooling is None:
            return token_ids[-keep:]
        return token_ids[:keep] if self._tokenizer is None else self._tokenizer.shorten(token_ids, keep)

    def token_ids_of(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt. Raises `RequestError`."""
        return self._tokens_of(prompt).token_ids

    def _tokens_of(self, prompt: Prompt) -> "_Tokens":
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return _Tokens(prompt.get("prompt"), list(prompt["prompt_token_ids"]), prompt.get("second_text", 0))
            if "prompt" not in prompt:
                raise RequestError(
                    f"a prompt given as a mapping needs the key prompt or prompt_token_ids; it has {sorted(prompt)}",
                    param="prompt",
                )
            return self._tokens_of(prompt["prompt"])
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError("the model has no tokenizer: send token ids instead of text", param="prompt")
            return _Tokens(prompt, self._tokenizer.encode(prompt))
        if isinstance(prompt, ImagePrompt):
            return _Tokens(prompt.text, list(prompt))
        token_ids = prompt if type(prompt) is list else list(prompt)
        if (known := self._known(token_ids)) is not None:
            return _Tokens(None, known, is_known=True)
        try:
            copy = msgspec.convert(token_ids, list[int])  # neither bool nor numpy's; quicker than a look at each type
        except msgspec.ValidationError:
            raise RequestError("a prompt is a text or a list of token ids (integers)", param="prompt") from None
        return _Tokens(None, copy)

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """`Tokenizer.bad_word_ids`. Raises `RequestError` if there is no tokenizer."""
        if self._tokenizer is None:
            raise RequestError("bad_words needs a tokenizer, which this model does not have", param="bad_words")
        return self._tokenizer.bad_word_ids(words)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt → a batch of one. A prompt is a text, a mapping, or a list whose first entry is a token id."""
    if isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # the first entry decides
    return prompts  # type: ignore[return-value]
