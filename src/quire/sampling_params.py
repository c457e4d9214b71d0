"""SamplingParams: what a client may ask of sampling, with the range of every field.

Field names and defaults are vLLM's. Validation happens in `__post_init__`, so a value that exists is a valid one;
limits that depend on the engine (vocabulary, context, `max_logprobs`) are checked again at the engine's door.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from reprlib import repr as brief
from typing import Any, Literal

from quire.errors import RequestError
from quire.structured_outputs import StructuredOutputsParams

MAX_N = 128
MAX_BEAM_WIDTH = 64
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_TOKEN_LIST = 4096
MAX_BAD_WORDS = 256
MAX_LOGITS_PROCESSORS = 16
MAX_EXTRA = 16
MAX_EXTRA_CHARS = 512
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow float32 logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends, and what is reported of it.

    Raises `RequestError` (naming the field) for a value out of range.
    """

    n: int = 1
    """Samples drawn from the prompt; their KV of the prompt is shared."""
    best_of: int | None = None
    """Samples drawn, of which the n of highest cumulative log-probability are returned, best first; None draws n."""
    beam_width: int | None = None
    """Search with this many beams instead of sampling; the best n are returned. None samples."""
    length_penalty: float = 1.0
    """Of a beam search: finished beams are ranked by their log-probability over length ** length_penalty."""
    early_stopping: bool | Literal["never"] = False
    """Of a beam search: true ends it once beam_width beams are finished; false when a live beam is unlikely to beat
    them at its present length; "never" when none could at any length (transformers' meanings)."""
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
    """Same seed, same tokens, whatever else is in the batch; None lets the engine draw one."""
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
    """The same for each prompt token after the first; always of the model's own distribution."""
    logprobs_mode: str = "raw_logprobs"
    """What `logprobs` are of: raw_logprobs, the model's own distribution, or processed_logprobs, the one that was
    drawn from, after processors, edits, temperature and filters (−inf for tokens these left out)."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id → value added to its logit, from −100 to 100."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these tokens can be sampled."""
    bad_words: tuple[str, ...] = ()
    """Texts whose last token may not be sampled when it would complete them."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """The token forms of `bad_words`, filled in where a tokenizer is at hand."""
    logits_processors: tuple[Any, ...] = ()
    """Callables f(output_token_ids, logits) or f(prompt_token_ids, output_token_ids, logits), one row's logits in and
    out, called in turn before anything else changes them. Only where the engine runs in the caller's process (`LLM`).
    """
    structured_outputs: StructuredOutputsParams | None = None
    """The form that the text must have; end of sequence is possible only where the text is whole."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    """Keep only this many last tokens of the prompt; −1 keeps what the context allows."""
    detokenize: bool = True
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Free-form labels of the client's own; never interpreted."""

    def __post_init__(self) -> None:
        # Lists and single strings are what clients send; the stored form is hashable and immutable.
        for name in ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logits_processors"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _as_tuple("allowed_token_ids", self.allowed_token_ids))
        words = tuple(_as_tuple("bad_words_token_ids", word) for word in self.bad_words_token_ids)
        object.__setattr__(self, "bad_words_token_ids", words)
        _check_integer("n", self.n, 1, MAX_N)
        _check_integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH, optional=True)
        _check_number("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(
                f'early_stopping is {brief(self.early_stopping)}; it must be true, false or "never"',
                param="early_stopping",
            )
        _check_integer("best_of", self.best_of, 1, MAX_N, optional=True)
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                f"best_of is {self.best_of}, less than n {self.n}: so many are returned; raise it or leave it out",
                param="best_of",
            )
        _check_number("temperature", self.temperature, 0.0, 1e6)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_included=False)
        _check_integer("top_k", self.top_k, -1, 2**31 - 1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, low_included=False)
        _check_integer("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1, optional=True)
        _check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}", param="min_tokens"
            )
        _check_integer("logprobs", self.logprobs, -1, 2**31 - 1, optional=True)
        _check_integer("prompt_logprobs", self.prompt_logprobs, -1, 2**31 - 1, optional=True)
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise RequestError(
                f"logprobs_mode is {brief(self.logprobs_mode)}; it must be one of {', '.join(LOGPROBS_MODES)}",
                param="logprobs_mode",
            )
        _check_integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, 2**31 - 1, optional=True)
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens is 0; give −1 or at least 1", param="truncate_prompt_tokens")
        _check_strings("stop", self.stop, MAX_STOP_STRINGS)
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need text: set detokenize to true", param="stop")
        _check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        _check_token_list("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            _check_token_list("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty: no token could be sampled", param="allowed_token_ids")
        # A word has one form where a text begins with it and another behind a space.
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
        for name in (
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "detokenize",
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"{name} is {brief(value)}; it must be true or false", param=name)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError(
                f"structured_outputs is {brief(self.structured_outputs)}; it must be a StructuredOutputsParams",
                param="structured_outputs",
            )
        _check_extra(self.extra)
        self._check_beam_search()
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
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError(
                    f"logit_bias is {brief(self.logit_bias)}; it must map token ids to numbers",
                    param="logit_bias",
                )
            bias = {_as_token_id("logit_bias", key): value for key, value in self.logit_bias.items()}
            _check_token_list("logit_bias", tuple(bias))
            for value in bias.values():
                _check_number("logit_bias", value, -100.0, 100.0)
            object.__setattr__(self, "logit_bias", bias)

    def _check_beam_search(self) -> None:
        if self.beam_width is None:
            for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != default:
                    raise RequestError(f"{name} belongs to a beam search: set beam_width", param=name)
            return
        if self.n > self.beam_width:
            raise RequestError(f"n is {self.n}, but {self.beam_width} beams end in at most as many texts", param="n")
        if self.temperature not in (0.0, 1.0) or self.top_p != 1.0 or self.top_k > 0 or self.min_p != 0.0:
            raise RequestError(
                "a beam search takes the most likely sequences and draws nothing: leave out temperature, top_p, top_k "
                "and min_p",
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
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_samples(self) -> int:
        """Samples that are drawn."""
        return self.best_of or self.n

    def with_changes(self, **changes: object) -> "SamplingParams":
        """A copy with some fields replaced, validated again."""
        return replace(self, **changes)  # type: ignore[arg-type]  # field types are checked in __post_init__


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """A beam search in vLLM's words, for `LLM.beam_search`; `sampling_params` says the same of one request."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """A search draws nothing: only 0 and 1 are accepted, and mean the same."""
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()

    @property
    def sampling_params(self) -> SamplingParams:
        """All beams are returned. Raises `RequestError` for a value out of range."""
        return SamplingParams(
            n=self.beam_width, **{field.name: getattr(self, field.name) for field in fields(BeamSearchParams)}
        )


def _check_number(name: str, value: object, low: float, high: float, *, low_included: bool = True) -> None:
    # An int may be too large for math.isfinite; it is out of range below.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise RequestError(f"{name} is {brief(value)}; it must be a finite number", param=name)
    if value > high or value < low or (value == low and not low_included):
        left = "at least" if low_included else "more than"
        raise RequestError(f"{name} is {value}; it must be {left} {low:g} and at most {high:g}", param=name)


def _check_integer(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {brief(value)}; it must be an integer", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it must be from {low} to {high}", param=name)


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


def _check_token_list(name: str, values: Sequence[object]) -> None:
    if len(values) > MAX_TOKEN_LIST:
        raise RequestError(f"{name} holds {len(values)} tokens; at most {MAX_TOKEN_LIST} are allowed", param=name)
    for value in values:
        _check_integer(name, value, 0, 2**31 - 1)


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
    if not isinstance(extra, Mapping) or not all(isinstance(t, str) for pair in extra.items() for t in pair):
        raise RequestError(f"extra is {brief(extra)}; it must map texts to texts", param="extra")
    if len(extra) > MAX_EXTRA:
        raise RequestError(f"extra holds {len(extra)} labels; at most {MAX_EXTRA} are allowed", param="extra")
    longest = max((len(text) for pair in extra.items() for text in pair), default=0)
    if longest > MAX_EXTRA_CHARS:
        raise RequestError(
            f"extra holds a text of {longest} characters; at most {MAX_EXTRA_CHARS} are allowed",
            param="extra",
        )
