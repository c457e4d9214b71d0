"""Guessed prompts: blocks of a request's text, for servers that do not tell block hashes.

Equal beginnings give equal blocks, and that is all a policy needs. The sizes are estimates.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import msgspec

from quire.routing.policies import Prompt

BYTES_PER_TOKEN = 4
BLOCK_TOKENS = 32
_BLOCK_BYTES = BLOCK_TOKENS * BYTES_PER_TOKEN
_FIELDS = ("model", "tools", "system", "instructions", "prompt", "messages", "input", "suffix")
"""Fields of a body that make up the prompt, in the order in which templates usually write them."""
_SESSIONS = ("prompt_cache_key", "session_id", "user")

_encode = msgspec.json.Encoder().encode


def guess_prompt(body: Mapping[str, Any]) -> Prompt:
    """The prompt of a request's JSON body. `cache_salt` parts equal texts, as it does in engines."""
    parts = [_encode(body[name]) for name in _FIELDS if body.get(name) is not None]
    text = b"\0".join(parts)
    digest = blake2b(_encode(str(body.get("cache_salt") or "")), digest_size=8)
    blocks = []
    for start in range(0, len(text) // _BLOCK_BYTES * _BLOCK_BYTES, _BLOCK_BYTES):
        digest.update(text[start : start + _BLOCK_BYTES])
        blocks.append(int.from_bytes(digest.digest(), "big"))
    return Prompt(blocks, max(1, len(text) // BYTES_PER_TOKEN), BLOCK_TOKENS, session_of(body))


def session_of(body: Mapping[str, Any]) -> str:
    """A name of the conversation, from the fields in which clients send one; may be empty."""
    return next((str(body[name])[:256] for name in _SESSIONS if isinstance(body.get(name), str)), "")
