"""Sender: on whose account a request runs, and what for; by this the engine orders, shares and predicts."""

import hashlib
from dataclasses import dataclass

import msgspec

from quire.server.auth import Client
from quire.server.protocol import ChatCompletionRequest, GenerateRequest

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Sender:
    """What the engine is told of a request besides its prompt and parameters."""

    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    """The API key's account where there are keys: nobody gets a second share by another name for a user."""
    workload: str = ""


def sender_of(request: GenerateRequest, client: Client) -> Sender:
    """Of one request and the client whose key came with it."""
    return Sender(
        request.priority or 0,
        client.salt + (request.cache_salt or ""),
        client.account or (request.user or ""),
        _workload(request),
    )


def _workload(request: GenerateRequest) -> str:
    """The route, and of a chat a hash of its system prompt: one application's requests have answers of like lengths."""
    if not isinstance(request, ChatCompletionRequest):
        return "completion"
    first = request.messages[0] if request.messages else None
    if first is None or first.role not in _SYSTEM_ROLES:
        return "chat"
    return "chat " + hashlib.blake2b(msgspec.json.encode(first.content), digest_size=8).hexdigest()
