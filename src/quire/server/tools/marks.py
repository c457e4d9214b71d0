"""Marks: which marks of a format are tokens of the vocabulary, and where these tokens stand in a reply.

In a reply, a mark that is a token counts only where the model sampled that token; the same characters spelled by other
tokens are text. Each such token is written as one lone surrogate, a character that no decoded text contains. Parsers
then compare characters and cannot confuse the two.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Sequence

from quire.engine.tokenizer import Tokenizer

_FIRST = 0xD800
_MAX_MARKS = 0x400


class Marks:
    """The tokens within some marks, and their characters."""

    def __init__(self, tokenizer: Tokenizer | None, marks: Iterable[str]) -> None:
        """Without a tokenizer every mark is text."""
        added = {} if tokenizer is None else {text: token_id for token_id, text in tokenizer.added_tokens.items()}
        joined = "\n".join(marks)
        contained = sorted((text for text in added if text.strip() and text in joined), key=len, reverse=True)
        self.char_of_id = {added[text]: chr(_FIRST + i) for i, text in enumerate(contained[:_MAX_MARKS])}
        self.text_of_id = {token_id: text for text, token_id in added.items()}
        self._ids = added
        self._tokens = re.compile("|".join(map(re.escape, contained))) if contained else None
        self._back = {ord(char): self.text_of_id[token_id] for token_id, char in self.char_of_id.items()}

    def encode(self, mark: str) -> str:
        """The mark with a character in place of each token."""
        if self._tokens is None:
            return mark
        return self._tokens.sub(lambda match: self.char_of_id[self._ids[match[0]]], mark)

    def decode(self, text: str) -> str:
        """The text with tokens spelled out."""
        return text if not self._back or text.isascii() else text.translate(self._back)

    def token_id(self, mark: str) -> int | None:
        """The token that is the whole mark."""
        token_id = self._ids.get(mark)
        return token_id if token_id in self.char_of_id else None

    def first_token_id(self, mark: str) -> int | None:
        """The token that begins the mark."""
        found = self._tokens.match(mark) if self._tokens is not None else None
        return None if found is None else self._ids[found[0]]

    def before_token(self, mark: str) -> str | None:
        """The text of the mark in front of its first token; None if it has no token."""
        found = self._tokens.search(mark) if self._tokens is not None else None
        return None if found is None else mark[: found.start()]

    def lark(self, mark: str) -> str:
        """The mark as a part of a Lark rule: token ids and texts."""
        parts: list[str] = []
        start = 0
        for match in self._tokens.finditer(mark) if self._tokens is not None else ():
            parts += [_quoted(mark[start : match.start()]), f"<[{self._ids[match[0]]}]>"]
            start = match.end()
        parts.append(_quoted(mark[start:]))
        return " ".join(part for part in parts if part)


class TokenFinder:
    """Puts the characters of marks into one sample's text, and leaves hidden tokens out."""

    def __init__(self, marks: Marks, hidden_ids: frozenset[int]) -> None:
        """`hidden_ids` are tokens to leave out; marks are never left out."""
        self._marks = marks
        self._hidden = hidden_ids - marks.char_of_id.keys()
        self._pending: deque[int] = deque()
        """Tokens that were sampled and whose text has not come yet."""
        self._held = ""

    def read(self, text: str, token_ids: Sequence[int], *, finished: bool) -> str:
        """The text that is settled. The end of `text` waits while it may begin the text of a sampled token."""
        chars = self._marks.char_of_id
        for token_id in token_ids:
            if token_id in chars or token_id in self._hidden:
                self._pending.append(token_id)
        if not self._pending:
            return text
        text, settled = self._held + text, ""
        while self._pending:
            token_id = self._pending[0]
            spelled = self._marks.text_of_id[token_id]
            at = text.find(spelled)
            if at < 0:
                break
            settled += text[:at] + chars.get(token_id, "")
            text = text[at + len(spelled) :]
            self._pending.popleft()
        held = 0 if finished or not self._pending else overlap(text, self._marks.text_of_id[self._pending[0]])
        self._held = text[len(text) - held :]
        return settled + text[: len(text) - held]


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` and is not all of it."""
    at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while at >= 0:
        if mark.startswith(text[at:]):
            return len(text) - at
        at = text.find(mark[0], at + 1)
    return 0


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
