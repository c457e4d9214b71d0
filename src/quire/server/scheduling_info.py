"""SchedulingInfo: tenant, priority, cache salt and workload of a request; the engine orders and shares work by them."""

import hashlib
from dataclasses import dataclass

import msgspec

from quire.request import BACKGROUND
from quire.server.auth import Client
from quire.server.protocol import ChatCompletionRequest, GenerateRequest

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class SchedulingInfo:
    """Everything the engine gets about a request besides its prompt and sampling parameters."""

    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    """The API key's account; without keys, the request's `user`. With keys `user` is ignored: a client cannot get a
    second share by sending another name."""
    workload: str = ""


def scheduling_info(request: GenerateRequest, client: Client) -> SchedulingInfo:
    """SchedulingInfo of `request`, sent by `client`."""
    return SchedulingInfo(
        BACKGROUND if client.background else request.priority or 0,
        client.salt + (request.cache_salt or ""),
        client.account or (request.user or ""),
        _workload(request),
    )


def _workload(request: GenerateRequest) -> str:
    """The route, and for a chat a hash of its system prompt: answers to one application have similar lengths."""
    if not isinstance(request, ChatCompletionRequest):
        return "completion"
    first = request.messages[0] if request.messages else None
    if first is None or first.role not in _SYSTEM_ROLES:
        return "chat"
    return "chat " + hashlib.blake2b(msgspec.json.encode(first.content), digest_size=8).hexdigest()
