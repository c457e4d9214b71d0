"""SchedulingInfo: tenant, priority, cache salt and workload of a request; the engine orders and shares work by them."""

import hashlib
from dataclasses import dataclass, field

import msgspec

from quire.request import BACKGROUND
from quire.server.api_keys import ApiKey
from quire.server.endpoint import RequestContext
from quire.server.key_use import KeyUse
from quire.server.protocol import ChatCompletionRequest, GenerateRequest
from quire.server.traces import RequestTrace

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
    adapter: str = ""
    """Name of the adapter; empty: the model alone."""
    use: KeyUse = field(default_factory=lambda: KeyUse(ApiKey()))
    """The use of its API key, which admits it."""
    trace: RequestTrace | None = None
    """None: nothing is traced."""


def scheduling_info(request: GenerateRequest, context: RequestContext) -> SchedulingInfo:
    """SchedulingInfo of `request`, the body of `context`."""
    client, traces = context.client, context.services.traces
    operation = "chat" if isinstance(request, ChatCompletionRequest) else "text_completion"
    model = context.adapter_name or context.engine.model_names[0]
    return SchedulingInfo(
        checked_priority(context, request.priority),
        client.salt + (request.cache_salt or ""),
        client.account or (request.user or ""),
        _workload(request),
        context.adapter_name,
        context.key_use,
        None if traces is None else traces.request(context.scope["headers"], operation=operation, model=model),
    )


def checked_priority(context: RequestContext, asked: int | None) -> int:
    """The priority of the API key, if it has one; a header of the response says that another was not used."""
    if context.client.background:
        return BACKGROUND
    own = context.key_use.key.priority
    if own is None:
        return asked or 0
    if asked not in (None, own):
        context.warn(f"priority {asked} has no effect: the API key has priority {own}")
    return own


def _workload(request: GenerateRequest) -> str:
    """The route, and for a chat a hash of its system prompt: answers to one application have similar lengths."""
    if not isinstance(request, ChatCompletionRequest):
        return "completion"
    first = request.messages[0] if request.messages else None
    if first is None or first.role not in _SYSTEM_ROLES:
        return "chat"
    return "chat " + hashlib.blake2b(msgspec.json.encode(first.content), digest_size=8).hexdigest()
