"""TextOffsets: the place in a choice's text at which each of its tokens begins, for `text_offset` of completions."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from quire.engine.detokenizer import REPLACEMENT
from quire.engine.tokenizer import Tokenizer

MAX_BYTES = 4
"""Of a character in UTF-8."""


@dataclass(slots=True)
class TextOffsets:
    """Counts the characters of one choice's text, token by token. The parts of a character all begin where it does."""

    tokenizer: Tokenizer
    skip_special_tokens: bool
    """The output's text leaves special tokens out."""
    _offset: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def of_prompt(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Offsets of the prompt's tokens in `text`, the prompt in front of the output. A special token has a place in
        it only if it is spelled there: a tokenizer adds others."""
        pieces = self.tokenizer.pieces
        blank = pieces.strip_start if pieces is not None and not text.startswith(pieces.strip_start or "\0") else ""
        num_added = self._num_added(token_ids, text)
        offsets = [0] * num_added
        for token_id in token_ids[num_added:]:
            offsets.append(min(self._offset, len(text)))
            special = self.tokenizer.added_tokens.get(token_id)
            if special is not None:
                self._offset += len(special) if text.startswith(special, self._offset) else 0
            else:
                self._add(self.tokenizer.token_bytes(token_id).removeprefix(blank.encode()))
                blank = ""
        self._offset = len(text)  # a character that the prompt begins is counted with the output
        return offsets

    def _num_added(self, token_ids: Sequence[int], text: str) -> int:
        """How many of the special tokens in front the tokenizer added: the others are spelled at the text's start."""
        front = list(takewhile(lambda content: content is not None, map(self.tokenizer.added_tokens.get, token_ids)))
        for num_added in range(len(front)):
            if text.startswith("".join(filter(None, front[num_added:]))):
                return num_added
        return len(front)

    def of_output(self, token_ids: Sequence[int], end: int | None) -> list[int]:
        """Offsets of further tokens of the output. `end` is the length of the finished text: a stop string may have
        cut tokens from it."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset if end is None else min(self._offset, end))
            if not (self.skip_special_tokens and token_id in self.tokenizer.special_ids):
                self._add(self.tokenizer.token_bytes(token_id))
        return offsets

    def _add(self, data: bytes) -> None:
        self._offset += len(self._decoder.decode(data))


def begun_character(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """How a decoded prompt ends if its last bytes begin a character: U+FFFD once, or for each byte; else nothing. A
    detokenizer shows the whole character as output."""
    if tokenizer.pieces is None:
        return ""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(b"".join(map(tokenizer.token_bytes, token_ids[-MAX_BYTES:])))
    begun = decoder.getstate()[0]
    return REPLACEMENT * (1 if begun and tokenizer.pieces.byte_level else len(begun))
