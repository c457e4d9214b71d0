"""/v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while the server runs, as in vLLM.

A client that may load a folder decides what the server reads, so both need --allow-runtime-lora, and of several API
keys an admin's.
"""

import asyncio
import re
from contextlib import aclosing

from msgspec import Struct

from quire.errors import CheckpointError, RequestError
from quire.lora.registry import Adapter
from quire.sampling_params import SamplingParams
from quire.server.backend import Engine
from quire.server.endpoint import Endpoint, RequestContext
from quire.server.errors import Refusal

_NAME = re.compile(r"[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]{0,255}")


class LoadAdapter(Struct):
    """Body of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    """A folder on the server's machine."""
    load_inplace: bool = False
    """Replace an adapter of that name."""


class UnloadAdapter(Struct):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None
    """vLLM's number of the adapter; not used."""


async def load_adapter(context: RequestContext) -> None:
    _check_allowed(context)
    request = await context.read(LoadAdapter)
    context.check_ready()
    engine, name = context.engine, request.lora_name
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"lora_name is {name[:80]!r}; it must be a text of 1 to 256 characters without control characters",
            param="lora_name",
        )
    if name in engine.model_names:
        raise RequestError(f"lora_name is {name!r}, which is the model's own name", param="lora_name")
    if name in engine.adapters and not request.load_inplace:
        raise RequestError(
            f"an adapter named {name!r} is loaded already; unload it first, or set load_inplace", param="lora_name"
        )
    try:
        adapter = await asyncio.to_thread(engine.adapters.identify, request.lora_path)
        await _try(engine, adapter)
        await asyncio.to_thread(engine.adapters.add, name, request.lora_path)
    except CheckpointError as error:
        raise RequestError(str(error), param="lora_path", code="invalid_adapter") from error
    await context.reply_bytes(f"Success: LoRA adapter '{name}' added successfully.".encode(), b"text/plain")


async def unload_adapter(context: RequestContext) -> None:
    _check_allowed(context)
    request = await context.read(UnloadAdapter)
    name = request.lora_name
    if name not in context.engine.adapters:
        raise Refusal(404, f"no adapter named {name[:200]!r} is loaded", code="adapter_not_found", param="lora_name")
    context.engine.adapters.remove(name)
    await context.reply_bytes(f"Success: LoRA adapter '{name}' removed successfully.".encode(), b"text/plain")


async def find_adapter(engine: Engine, name: str) -> Adapter | None:
    """The adapter of that name as its files are now; None for the empty name, the model alone. Raises
    `RequestError`."""
    if not name:
        return None
    try:
        if (known := engine.adapters.known(name)) is not None:
            return known
        return await asyncio.to_thread(engine.adapters.find, name)
    except CheckpointError as error:
        raise RequestError(
            f"the model {name!r} cannot be served: {error}", param="model", code="invalid_adapter"
        ) from error


async def _try(engine: Engine, adapter: Adapter) -> None:
    """Compute one token with an adapter, which loads it. Raises `RequestError` if it does not fit the model."""
    params = SamplingParams(temperature=0.0, max_tokens=1)
    async with aclosing(engine.generate([0], params, adapter=adapter)) as outputs:
        async for _ in outputs:
            pass


def _check_allowed(context: RequestContext) -> None:
    if not context.engine.adapters.enabled:
        raise Refusal(404, "adapters are off; start the server with --enable-lora", code="adapters_off")
    if not context.settings.allow_runtime_lora:
        raise Refusal(
            403,
            "adapters cannot be loaded or unloaded while this server runs; start it with --allow-runtime-lora, or name "
            "them with --lora-modules",
            code="runtime_lora_off",
        )
    if not context.key_use.sees_all:
        raise Refusal(403, "only an admin's API key may load and unload adapters", code="not_admin")


ENDPOINTS = (
    Endpoint("POST", "/v1/load_lora_adapter", load_adapter, "Serve a LoRA adapter under a name", LoadAdapter),
    Endpoint("POST", "/v1/unload_lora_adapter", unload_adapter, "Stop serving it", UnloadAdapter),
)
