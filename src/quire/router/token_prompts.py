"""Prompts by their tokens, for servers that are not Quire and send KV events: /tokenize says what a prompt's are."""

from collections.abc import Mapping
from typing import Any

import msgspec

from quire.router.guess import session_of
from quire.routing.policies import Prompt
from quire.server.handover import HASH_BYTES, block_hashes

_TOKENIZE_FIELDS = ("model", "messages", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt")


class _Tokens(msgspec.Struct):
    tokens: list[int]


def question(path: str, body: Mapping[str, Any]) -> bytes | None:
    """The body of a /tokenize request for the prompt in `body`. None where its tokens would not say which blocks it
    has: salted prompts, several at once, and endpoints whose prompts /tokenize does not make."""
    if body.get("cache_salt"):
        return None
    if path == "/v1/completions" and isinstance(body.get("prompt"), str):
        return msgspec.json.encode({"model": body.get("model"), "prompt": body["prompt"]})
    if path == "/v1/chat/completions" and isinstance(body.get("messages"), list):
        return msgspec.json.encode({name: body[name] for name in _TOKENIZE_FIELDS if body.get(name) is not None})
    return None


def read_tokens(content: bytes) -> list[int]:
    """The tokens in an answer of /tokenize. Raises `msgspec.DecodeError`."""
    return msgspec.json.decode(content, type=_Tokens).tokens


def prompt_of(tokens: list[int], block_size: int, body: Mapping[str, Any]) -> Prompt:
    """The prompt with Quire's hashes of its blocks."""
    data, size = block_hashes(tokens, block_size, ""), HASH_BYTES
    hashes = [int.from_bytes(data[at : at + size], "big") for at in range(0, len(data), size)]
    return Prompt(hashes, max(1, len(tokens)), block_size, session_of(body))
