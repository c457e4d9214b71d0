"""Detokenizer: the text of one sample, token by token, never with half a character and never past a stop string.

Text waits in three places before it is shown: bytes that begin a character, characters that may begin a stop string,
and text that the caller has not read yet. All work is linear in the tokens.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from quire.engine.tokenizer import PieceRules, Tokenizer
from quire.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was found. The first `num_tokens` output tokens complete it; later tokens do not count."""

    stop: str
    num_tokens: int


class Detokenizer:
    """Text of the output tokens passed to `append`: piece by piece from `delta`, or all of it in `text`.

    The text continues the prompt: a SentencePiece token keeps its leading space unless no visible token came before.
    The deltas add up to `Tokenizer.decode` of all tokens, with one exception: if byte tokens like `<0xE2>` form whole
    characters and then a broken one, the whole ones stay, because they were shown. The caller omits a stop token that
    ended the output, and does not create a detokenizer if `params.detokenize` is off.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset[int]()
        self._decoder: _Decoder
        if tokenizer.pieces is not None:
            self._decoder = _PieceDecoder(tokenizer, tokenizer.pieces, hidden, prompt_token_ids)
        else:
            spaces = params.skip_special_tokens or params.spaces_between_special_tokens
            self._decoder = _WindowDecoder(tokenizer, hidden, prompt_token_ids, spaces_between_special_tokens=spaces)
        self._stops = [_StopString(stop) for stop in params.stop]
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._match: StopMatch | None = None
        self._parts: list[str] = []  # safe to show, in order
        self._num_parts_taken = 0
        self._held = ""  # may be the start of a stop string

    @property
    def text(self) -> str:
        """All text that is safe to show so far."""
        return "".join(self._parts)

    def delta(self) -> str:
        """The text that became safe since the last call."""
        new = "".join(self._parts[self._num_parts_taken :])
        self._num_parts_taken = len(self._parts)
        return new

    @property
    def has_stops(self) -> bool:
        """Whether a stop string may end the text."""
        return bool(self._stops)

    def next_text(self, token_id: int) -> str:
        """`append` of one token and `delta` in one, for a text without stop strings."""
        self._num_tokens += 1
        text = self._decoder.add(token_id)
        if text:
            self._parts.append(text)
            self._num_parts_taken += 1
        return text

    def append(self, token_ids: Sequence[int], finished: bool = False) -> StopMatch | None:
        """Add the next output tokens; returns the stop string that they complete, if any.

        `finished`: no token will follow, so held text is shown.
        """
        for token_id in token_ids:
            if self._match is not None:
                return self._match
            self._num_tokens += 1
            self._show(self._decoder.add(token_id))
        if finished and self._match is None:
            self._show(self._decoder.flush())
            self._release(self._held)
            self._held = ""
        return self._match

    def _show(self, text: str) -> None:
        """Show the part of `text` that cannot belong to a stop string; record a stop string that ends in it."""
        if not text:
            return
        if not self._stops:
            self._release(text)
            return
        ends = [stop.first_end(text, allowed=self._num_tokens > self._min_tokens) for stop in self._stops]
        found = [(end, -len(stop.text), stop.text) for end, stop in zip(ends, self._stops, strict=True) if end]
        pending = self._held + text
        if found:
            # The first complete stop string wins, the longest of those that end together. Chunking cannot change it.
            end, _, stop = min(found)
            end += len(self._held)
            self._release(pending[: end if self._include_stop else end - len(stop)])
            self._held = ""
            self._match = StopMatch(stop, self._num_tokens)
            return
        safe = len(pending) - max(stop.num_matched for stop in self._stops)
        self._release(pending[:safe])
        self._held = pending[safe:]

    def _release(self, text: str) -> None:
        if text:
            self._parts.append(text)


class _StopString:
    """Finds a text in a stream of pieces with the Knuth-Morris-Pratt automaton: each character is read once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        """Length of the longest prefix of `text` that the stream ends with."""
        self._borders = [0] * len(text)  # [length − 1]: the longest proper prefix that is also a suffix
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._borders[length - 1]
            length += text[i] == text[length]
            self._borders[i] = length

    def first_end(self, piece: str, *, allowed: bool) -> int:
        """Read `piece`; returns the end of the first occurrence, 0 if there is none or none is `allowed`."""
        matched, position = self.num_matched, 0
        while position < len(piece):
            if matched == 0:  # the usual case: skip to where it could begin
                position = piece.find(self.text[0], position)
                if position < 0:
                    break
            while matched and piece[position] != self.text[matched]:
                matched = self._borders[matched - 1]
            matched += piece[position] == self.text[matched]
            position += 1
            if matched == len(self.text):
                if allowed:
                    return position
                matched = self._borders[matched - 1]
        self.num_matched = matched
        return 0


class _Decoder(ABC):
    """Turns tokens into whole characters."""

    @abstractmethod
    def add(self, token_id: int) -> str:
        """The characters that the token completes."""

    @abstractmethod
    def flush(self) -> str:
        """The rest of an incomplete character, as U+FFFD."""


class _PieceDecoder(_Decoder):
    """For vocabularies that decode by joining bytes: tables and an incremental UTF-8 decoder."""

    def __init__(
        self, tokenizer: Tokenizer, rules: PieceRules, hidden: frozenset[int], prompt_token_ids: Sequence[int]
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._whole_texts = tokenizer.whole_texts
        self._special = tokenizer.special_ids
        self._hidden = hidden
        # The library shows a broken character as one U+FFFD in a byte-level vocabulary, else as one for each byte.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace" if rules.byte_level else _EACH_BYTE)
        visible = (self._token_bytes(token_id) for token_id in prompt_token_ids if token_id not in hidden)
        self._strip_start = "" if any(visible) else rules.strip_start
        # The prompt may end inside a character that the output completes.
        tail = [self._token_bytes(token_id) for token_id in prompt_token_ids[-3:] if token_id not in hidden]
        self._utf8.decode(b"".join(tail))
        self._stands_alone = self._at_border()

    def _at_border(self) -> bool:
        """Whether no character has begun and nothing is to be stripped: then what came before changes no token."""
        return not self._strip_start and not self._utf8.getstate()[0]

    def add(self, token_id: int) -> str:
        if self._stands_alone and (known := self._whole_texts.get(token_id)) is not None:
            return known
        if token_id in self._hidden:
            return ""
        stood_alone = self._stands_alone
        text = self._stripped(self._utf8.decode(self._token_bytes(token_id)))
        self._stands_alone = self._at_border()
        if stood_alone and self._stands_alone and token_id not in self._special:
            self._whole_texts[token_id] = text
        return text

    def flush(self) -> str:
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        """The text without the space that encoding added before the first word."""
        while text and self._strip_start:
            if text[0] != self._strip_start[0]:
                self._strip_start = ""
                break
            text, self._strip_start = text[1:], self._strip_start[1:]
        return text


class _WindowDecoder(_Decoder):
    """For any other vocabulary: decodes the last few tokens with and without the new one; the difference is new text.

    The window begins one complete text before the last, because a token can change the text of its left neighbour.
    """

    MAX_PENDING = 4
    """Most tokens that wait for the rest of a character, which has at most four bytes."""

    CONTEXT = 6
    """Prompt tokens that are decoded together with the first output token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        hidden: frozenset[int],
        prompt_token_ids: Sequence[int],
        *,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._spaces = spaces_between_special_tokens
        self._window = [token_id for token_id in prompt_token_ids[-self.CONTEXT :] if token_id not in hidden]
        self._num_shown = len(self._window)  # of the window's tokens
        self._after_added = False

    def add(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        added = self._tokenizer.added_tokens.get(token_id)
        joined = added is not None and self._after_added and not self._spaces
        self._after_added = added is not None
        self._window.append(token_id)
        before, after = self._texts()
        if after.endswith(REPLACEMENT) and len(self._window) - self._num_shown < self.MAX_PENDING:
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return added if joined and added is not None else after[len(before) :]

    def flush(self) -> str:
        before, after = self._texts()
        self._num_shown = len(self._window)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """The window's text that was shown, and all of it."""
        shown = self._window[: self._num_shown]
        return (
            self._tokenizer.decode(shown, skip_special_tokens=False),
            self._tokenizer.decode(self._window, skip_special_tokens=False),
        )


_EACH_BYTE = "quire.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)
