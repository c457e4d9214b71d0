"""SamplingParams: what a client may ask of sampling, with the range of every field.

Field names and defaults are vLLM's. `__post_init__` validates, so every instance is valid. Limits that depend on the
engine (vocabulary, context, `max_logprobs`) are checked in `quire.engine.limits`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from reprlib import repr as brief
from typing import Any, Literal, NamedTuple

from quire.errors import RequestError
from quire.structured_outputs import StructuredOutputsParams
from quire.vllm_rare_options import check_sampling_fields

MAX_N = 128
MAX_BEAM_WIDTH = 64
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_TOKEN_LIST = 4096
MAX_BAD_WORDS = 256
MAX_LOGITS_PROCESSORS = 16
MAX_EXTRA, MAX_EXTRA_CHARS = 16, 512
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow float32 logits."""
_MAX_INT = 2**31 - 1


class _Range(NamedTuple):
    """Allowed values of a number; both ends are included."""

    low: float
    high: float
    optional: bool = False
    """None is allowed too."""
    above_low: bool = False
    """`low` itself is not allowed."""


_INTEGERS = {
    "n": _Range(1, MAX_N),
    "best_of": _Range(1, MAX_N, optional=True),
    "beam_width": _Range(1, MAX_BEAM_WIDTH, optional=True),
    "top_k": _Range(-1, _MAX_INT),
    "seed": _Range(-(2**63), 2**64 - 1, optional=True),
    "max_tokens": _Range(1, _MAX_INT, optional=True),
    "min_tokens": _Range(0, _MAX_INT),
    "logprobs": _Range(-1, _MAX_INT, optional=True),
    "prompt_logprobs": _Range(-1, _MAX_INT, optional=True),
    "truncate_prompt_tokens": _Range(-1, _MAX_INT, optional=True),
}
_NUMBERS = {
    "length_penalty": _Range(-10.0, 10.0),
    "temperature": _Range(0.0, 1e6),
    "top_p": _Range(0.0, 1.0, above_low=True),
    "min_p": _Range(0.0, 1.0),
    "presence_penalty": _Range(-2.0, 2.0),
    "frequency_penalty": _Range(-2.0, 2.0),
    "repetition_penalty": _Range(1e-4, 1e4),
}
NUMBER_RANGES: Mapping[str, _Range] = {**_INTEGERS, **_NUMBERS}
"""Allowed values of the fields that are numbers."""
_TOKEN_ID = _Range(0, _MAX_INT)
_LOGIT_BIAS = _Range(-100.0, 100.0)
_FLAGS = (
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "detokenize",
)
_TUPLES = ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logits_processors")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends, and what is reported of it.

    Raises `RequestError` (naming the field) for an unknown field or a value out of range.
    """

    n: int = 1
    """Samples per prompt; they share the prompt's KV."""
    best_of: int | None = None
    """Samples to draw. The n with the highest cumulative log-probability are returned, best first; None: n."""
    beam_width: int | None = None
    """Search with this many beams instead of sampling; the best n are returned. None samples."""
    length_penalty: float = 1.0
    """For beam search: finished beams are ranked by log-probability / length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search ends. True: once beam_width beams are finished; false: when no live beam is likely to beat
    them at its present length; "never": when none could beat them at any length (transformers' meanings)."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 and −1 keep all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit once per earlier occurrence in the output (OpenAI's definition)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al. 2019, CTRL)."""
    seed: int | None = None
    """Same seed, same tokens, whatever else is in the batch; None lets the engine choose one."""
    stop: tuple[str, ...] = ()
    """Texts that end the output; they are cut from it unless `include_stop_str_in_output`."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output like an end-of-sequence token."""
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """Most tokens generated per sample; None means all that the context has room for."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be sampled before this many tokens."""
    logprobs: int | None = None
    """Report the log-probability of each chosen token and of this many most likely ones (−1: the whole vocabulary)."""
    prompt_logprobs: int | None = None
    """Like `logprobs`, for each prompt token after the first; always the model's own distribution."""
    logprobs_mode: str = "raw_logprobs"
    """Distribution of `logprobs`: raw_logprobs, the model's own, or processed_logprobs, the one that was sampled from,
    after processors, edits, temperature and filters (−inf for excluded tokens)."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id → value added to its logit, from −100 to 100."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens can be sampled."""
    bad_words: tuple[str, ...] = ()
    """Texts that the output may not contain: the token that would complete one is not sampled."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """The token forms of `bad_words`; filled in by the engine if it has a tokenizer."""
    logits_processors: tuple[Any, ...] = ()
    """Callables f(output_token_ids, logits) or f(prompt_token_ids, output_token_ids, logits) that return the new logits
    of one row. They are called in turn before any other change to the logits. Only for `LLM`, whose engine runs in the
    caller's process."""
    structured_outputs: StructuredOutputsParams | None = None
    """Constraint on the text; it can end only when the text satisfies it."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    """Keep only this many last tokens of the prompt; −1 keeps what the context allows."""
    detokenize: bool = True
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Free-form labels of the client, for logits processors. The engine does not interpret them."""

    def __new__(cls, **options: object) -> "SamplingParams":
        check_sampling_fields(options.keys(), cls.__dataclass_fields__.keys())
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._freeze()
        for name, limits in _INTEGERS.items():
            value = getattr(self, name)
            if type(value) is not int or not limits.low <= value <= limits.high:
                _check_integer(name, value, limits)
        for name, limits in _NUMBERS.items():
            value = getattr(self, name)
            if type(value) is not float or not limits.low < value <= limits.high:
                _check_number(name, value, limits)
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"{name} is {brief(value)}; it must be true or false", param=name)
        self._check_counts()
        self._check_texts()
        self._check_tokens()
        self._check_logits_processors()
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError(
                f"structured_outputs is {brief(self.structured_outputs)}; it must be a StructuredOutputsParams",
                param="structured_outputs",
            )
        _check_extra(self.extra)
        self._check_beam_search()

    def _freeze(self) -> None:
        """Replace the lists and single texts that clients send by tuples, which are immutable and hashable."""
        for name in _TUPLES:
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _as_tuple("allowed_token_ids", self.allowed_token_ids))
        words = tuple(_as_tuple("bad_words_token_ids", word) for word in self.bad_words_token_ids)
        object.__setattr__(self, "bad_words_token_ids", words)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError(
                    f"logit_bias is {brief(self.logit_bias)}; it must map token ids to numbers", param="logit_bias"
                )
            _check_count("logit_bias", self.logit_bias)
            bias = {_as_token_id("logit_bias", key): value for key, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)

    def _check_counts(self) -> None:
        """Checks between numbers, and of values that are no range."""
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                f"best_of is {self.best_of}, less than n {self.n}: so many are returned; raise it or leave it out",
                param="best_of",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", param="min_tokens"
            )
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens is 0; give −1 or at least 1", param="truncate_prompt_tokens")
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise RequestError(
                f"logprobs_mode is {brief(self.logprobs_mode)}; it must be one of {', '.join(LOGPROBS_MODES)}",
                param="logprobs_mode",
            )

    def _check_texts(self) -> None:
        _check_strings("stop", self.stop, MAX_STOP_STRINGS)
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text: set detokenize to true", param="stop")
        _check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)

    def _check_tokens(self) -> None:
        _check_token_list("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            _check_token_list("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty: no token could be sampled", param="allowed_token_ids")
        # Each word has two token forms: at the start of a text, and behind a space.
        if len(self.bad_words_token_ids) > 2 * MAX_BAD_WORDS:
            raise RequestError(
                f"bad_words_token_ids holds {len(self.bad_words_token_ids)} words; "
                f"at most {2 * MAX_BAD_WORDS} are allowed",
                param="bad_words_token_ids",
            )
        for word in self.bad_words_token_ids:
            _check_token_list("bad_words_token_ids", word)
            if not word:
                raise RequestError(
                    "bad_words_token_ids holds an empty word; each needs a token", param="bad_words_token_ids"
                )
        if self.logit_bias is not None:
            _check_token_list("logit_bias", tuple(self.logit_bias))
            for token_id, value in self.logit_bias.items():
                _check_number("logit_bias", value, _LOGIT_BIAS, label=f"logit_bias of token {token_id}")

    def _check_logits_processors(self) -> None:
        if len(self.logits_processors) > MAX_LOGITS_PROCESSORS:
            raise RequestError(
                f"logits_processors holds {len(self.logits_processors)} callables; at most {MAX_LOGITS_PROCESSORS} are "
                "allowed",
                param="logits_processors",
            )
        for processor in self.logits_processors:
            if not callable(processor):
                raise RequestError(
                    f"logits_processors holds {brief(processor)}; each entry must be callable",
                    param="logits_processors",
                )

    def _check_beam_search(self) -> None:
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f'early_stopping is {brief(self.early_stopping)}; it must be true, false or "never"',
                param="early_stopping",
            )
        if self.beam_width is None:
            for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != default:
                    raise RequestError(f"{name} belongs to a beam search: set beam_width", param=name)
            return
        if self.n > self.beam_width:
            raise RequestError(f"n is {self.n}, but {self.beam_width} beams give at most as many texts", param="n")
        if self.temperature not in (0.0, 1.0) or self.top_p != 1.0 or self.top_k > 0 or self.min_p != 0.0:
            raise RequestError(
                "a beam search takes the most likely sequences and does not sample: leave out temperature, top_p, "
                "top_k and min_p",
                param="beam_width",
            )
        if self.best_of is not None:
            raise RequestError("a beam search returns the best n of its beams: leave out best_of", param="best_of")
        if self.logprobs_mode != "raw_logprobs":
            raise RequestError("a beam search reports raw_logprobs: leave out logprobs_mode", param="logprobs_mode")
        if self.stop:
            raise RequestError(
                "stop strings would end a beam search in the middle of its comparison; use stop_token_ids",
                param="stop",
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_samples(self) -> int:
        """Number of samples computed: best_of, else n."""
        return self.best_of or self.n

    def with_changes(self, **changes: object) -> "SamplingParams":
        """A copy with some fields replaced, validated again."""
        return replace(self, **changes)  # type: ignore[arg-type]  # field types are checked in __post_init__


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Parameters of `LLM.beam_search`, with vLLM's names; `sampling_params` converts them."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """Beam search does not sample: only 0 and 1 are accepted, and mean the same."""
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()

    @property
    def sampling_params(self) -> SamplingParams:
        """The equivalent `SamplingParams`, which return all beams. Raises `RequestError` for a value out of range."""
        return SamplingParams(
            n=self.beam_width, **{field.name: getattr(self, field.name) for field in fields(BeamSearchParams)}
        )


def _check_number(name: str, value: object, limits: _Range, *, label: str = "") -> None:
    # An int may be too large for math.isfinite; it is out of range below.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise RequestError(f"{label or name} is {brief(value)}; it must be a finite number", param=name)
    low, high = limits.low, limits.high
    if value > high or value < low or (value == low and limits.above_low):
        least = "more than" if limits.above_low else "at least"
        raise RequestError(f"{label or name} is {value}; it must be {least} {low:g} and at most {high:g}", param=name)


def _check_integer(name: str, value: object, limits: _Range) -> None:
    if value is None and limits.optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {brief(value)}; it must be an integer", param=name)
    if not limits.low <= value <= limits.high:
        raise RequestError(f"{name} is {value}; it must be from {limits.low} to {limits.high}", param=name)


def _check_strings(name: str, values: Sequence[object], limit: int) -> None:
    if len(values) > limit:
        raise RequestError(f"{name} holds {len(values)} texts; at most {limit} are allowed", param=name)
    for value in values:
        if not isinstance(value, str) or not value:
            raise RequestError(f"{name} holds {brief(value)}; each entry must be a non-empty string", param=name)
        if len(value) > MAX_STOP_STRING_CHARS:
            raise RequestError(
                f"{name} holds a text of {len(value)} characters; at most {MAX_STOP_STRING_CHARS} are allowed",
                param=name,
            )


def _check_count(name: str, values: Sized) -> None:
    if len(values) > MAX_TOKEN_LIST:
        raise RequestError(f"{name} holds {len(values)} tokens; at most {MAX_TOKEN_LIST} are allowed", param=name)


def _check_token_list(name: str, values: Sequence[object]) -> None:
    _check_count(name, values)
    for value in values:
        _check_integer(name, value, _TOKEN_ID)


def _as_token_id(name: str, key: object) -> int:
    """JSON objects have string keys, so OpenAI clients send token ids as strings."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= len(str(2**31)):
        return int(key)
    raise RequestError(f"{name} has the key {brief(key)}; keys are token ids", param=name)


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    """Lists become tuples, a single text or token a tuple of one, None an empty tuple."""
    if value is None:
        return ()
    if isinstance(value, str | int) or callable(value):
        return (value,)
    if not isinstance(value, Iterable):
        raise RequestError(f"{name} is {brief(value)}; it must be a list", param=name)
    return tuple(value)


def _check_extra(extra: object) -> None:
    if isinstance(extra, Mapping) and len(extra) > MAX_EXTRA:
        raise RequestError(f"extra holds {len(extra)} labels; at most {MAX_EXTRA} are allowed", param="extra")
    if not isinstance(extra, Mapping) or not all(isinstance(t, str) for pair in extra.items() for t in pair):
        raise RequestError(f"extra is {brief(extra)}; it must map texts to texts", param="extra")
    longest = max((len(text) for pair in extra.items() for text in pair), default=0)
    if longest > MAX_EXTRA_CHARS:
        text = f"extra holds a text of {longest} characters; at most {MAX_EXTRA_CHARS} are allowed"
        raise RequestError(text, param="extra")
