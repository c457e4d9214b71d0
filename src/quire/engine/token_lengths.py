"""Bounds on how much text a token can stand for, read from a tokenizer's own description."""

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

_KEEPS_TEXT = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "Prepend", "Replace"}
"""Steps before the vocabulary that drop no characters, if their own options do not say so."""
_COMPOSES = {"NFC", "NFKC"}
_MOST_COMPOSED = 4
"""Characters that Unicode composes to a single one, at most."""


def longest_token(backend: tokenizers.Tokenizer) -> int | None:
    """Characters of a text that the longest token stands for; None if some token can stand for any number."""
    steps = [*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)]
    kinds = {step["type"] for step in steps}
    if kinds - _KEEPS_TEXT - _COMPOSES or any(map(_drops, steps)):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # such a token takes all spaces beside it
    model = json.loads(backend.model.__getstate__()) if "ByteLevel" not in kinds else {}
    if model and not model.get("byte_fallback") and (model.get("fuse_unk") or model.get("unk_token") is None):
        return None  # unknown characters become one token, or none
    longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
    return longest * (_MOST_COMPOSED if kinds & _COMPOSES else 1)


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    state = json.loads(part.__getstate__()) if part is not None else None
    waiting = [state] if state else []
    while waiting:
        step = waiting.pop()
        nested = step.get("normalizers") or step.get("pretokenizers")
        if nested is None:
            yield step
        else:
            waiting += nested


def _drops(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "Split" | "Punctuation", "behavior": "Removed"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return len(content) < len(pattern)
        case {"type": "Replace"}:
            return True
    return False
